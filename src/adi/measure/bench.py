"""``bench``: contestants in turn on the same prompts, in one run; medians of per-prompt ratios with their interval.

Every prompt is run by every contestant before the next prompt begins, in an order that turns with the prompt, so that a
machine whose speed drifts wrongs nobody.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from adi.measure.circumstances import circumstances
from adi.measure.contestants import Outcome, Setting, serve
from adi.measure.statistics import bootstrap_median
from adi.prompts import PromptItem

FORMAT, VERSION = "adi-bench", 1
WARM_UP_TOKENS = 8
Progress = Callable[[int, int, str], None]


@dataclass
class Contestant:
    """One process under test, what it gave for every prompt (several times), and why it stopped if it did."""

    name: str
    setting: Setting
    error: str | None = None
    peak_bytes: int | None = None
    outcomes: dict[int, list[Outcome]] = field(default_factory=dict)

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.name, self.setting), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def ask(self, *order: Any) -> Any:
        """Send an order and wait for its answer; None once something went wrong, which ``error`` then tells."""
        if self.error is not None:
            return None
        self._pipe.send(order)
        return self._receive()

    def stop(self) -> None:
        if self.error is None:
            self._pipe.send(None)
            self.peak_bytes = self._receive()
        self._process.join(timeout=10)
        self._process.terminate()

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            kind, value = "error", "its process died"
        if kind == "error":
            self.error = value
            return None
        return value


def bench(
    names: Sequence[str],
    items: Sequence[PromptItem],
    setting: Setting,
    *,
    max_new_tokens: int = 128,
    repeats: int = 1,
    command: str = "",
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Any]:
    """Run all contestants on all prompts (first turns) and return the result document.

    The first name must be one of adi's modes: it encodes the prompts for everybody. A contestant that cannot run is
    listed with its error.
    """
    contestants = [Contestant(name, setting) for name in dict.fromkeys(names)]
    total, done = len(items) * repeats * len(contestants), 0
    try:
        for contestant in contestants:
            progress(done, total, f"loading {contestant.name}")
            contestant.start()
        encoded = [contestants[0].ask("encode", item.prompt) for item in items]
        if contestants[0].error is not None:
            raise ValueError(f"{contestants[0].name} cannot run, and it gives the others their tokens: {contestants[0].error}")
        for contestant in contestants:
            contestant.ask("run", encoded[0], min(WARM_UP_TOKENS, max_new_tokens))
        for i, ids in enumerate(encoded):
            for repeat in range(repeats):
                turn = (i + repeat) % len(contestants)
                for contestant in contestants[turn:] + contestants[:turn]:
                    outcome = contestant.ask("run", ids, max_new_tokens)
                    if outcome is not None:
                        contestant.outcomes.setdefault(i, []).append(outcome)
                    done += 1
                    progress(done, total, contestant.name)
    finally:
        for contestant in contestants:
            if hasattr(contestant, "_process"):
                contestant.stop()
    return {
        "format": FORMAT,
        "version": VERSION,
        **circumstances(command, items),
        **asdict(setting),
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "runs": [_run(c, _reference(c, contestants), items) for c in contestants],
        "ratios": [_ratio(a, b, items, setting.seed) for a in contestants for b in contestants if _comparable(a, b)],
    }


def _reference(contestant: Contestant, all_: Sequence[Contestant]) -> Contestant | None:
    """Full depth at the same precision, which the contestant's tokens should equal."""
    precision = contestant.name.rsplit(":", 1)[-1]
    return next((c for c in all_ if c.name == f"adi:full:{precision}" and c.error is None), None)


def _speed(contestant: Contestant, prompt: int) -> float:
    """Tokens per second on one prompt: the median of its repeats."""
    return median(len(o.token_ids) / o.seconds for o in contestant.outcomes[prompt])


def _run(contestant: Contestant, reference: Contestant | None, items: Sequence[PromptItem]) -> dict[str, Any]:
    if contestant.error is not None or not contestant.outcomes:
        return {"name": contestant.name, "error": contestant.error or "it gave no result"}
    prompts = sorted(contestant.outcomes)
    every = [o for p in prompts for o in contestant.outcomes[p]]
    rounds = [len(o.token_ids) / o.rounds for o in every if o.rounds]
    return {
        "name": contestant.name,
        "error": None,
        "tokens_per_second": median(_speed(contestant, p) for p in prompts),
        "ttft_seconds": median(o.ttft_seconds for o in every),
        "peak_bytes": contestant.peak_bytes,
        "tokens_per_round": median(rounds) if rounds else None,
        "accepted_share": _share(every),
        "match": _match(contestant, reference, prompts),
        "per_category": {
            category: {
                "tokens_per_second": median(_speed(contestant, p) for p in mine),
                "match": _match(contestant, reference, mine),
            }
            for category, mine in _categories(items, prompts).items()
        },
    }


def _share(outcomes: Sequence[Outcome]) -> float | None:
    drafted = sum(o.drafted or 0 for o in outcomes)
    return sum(o.accepted or 0 for o in outcomes) / drafted if drafted else None


def _match(contestant: Contestant, reference: Contestant | None, prompts: Sequence[int]) -> float | None:
    """Share of prompts whose tokens are the reference's."""
    if reference is None:
        return None
    same = [
        contestant.outcomes[p][0].token_ids == reference.outcomes[p][0].token_ids for p in prompts if p in reference.outcomes
    ]
    return sum(same) / len(same) if same else None


def _categories(items: Sequence[PromptItem], prompts: Sequence[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for p in prompts:
        found.setdefault(items[p].category, []).append(p)
    return found


def _comparable(a: Contestant, b: Contestant) -> bool:
    """adi's modes against everybody else."""
    return a is not b and a.name.startswith("adi:") and bool(a.outcomes) and bool(b.outcomes)


def _ratio(a: Contestant, b: Contestant, items: Sequence[PromptItem], seed: int) -> dict[str, Any]:
    both = [p for p in a.outcomes if p in b.outcomes]
    ratios = {p: _speed(a, p) / _speed(b, p) for p in both}
    found = bootstrap_median(list(ratios.values()), seed=seed)
    categories = _categories(items, both)
    per_category = {name: median(ratios[p] for p in mine) for name, mine in categories.items()}
    return {"a": a.name, "b": b.name, **asdict(found), "per_category": per_category}
