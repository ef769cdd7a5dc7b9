"""Decoding whose every decision and bill follows from the text and the cost table: the same figures whatever the machine does.

What passes cost is measured once; prompts are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adi.artifact import Exits
from adi.decoding.drafting.cost_model import CostModel, measure
from adi.decoding.generate import generate
from adi.decoding.policies import Verified
from adi.drafters.history import History
from adi.measure.statistics import clustered_median
from adi.model.load import Model
from adi.model.tokenizer import tokenizer_fingerprint
from adi.progress import Progress

Ids = tuple[int, ...]
REPETITIONS = (1, 2, 4, 8)


@dataclass
class SteadyCosts(CostModel):
    """Costs as in the table, whatever use measures; every pass and step is added up in ``bill``, in seconds."""

    bill: list[float] = field(default_factory=list, compare=False)

    def passed(self, rows: int, seconds: float) -> None:
        """Billed as in the table."""
        self.bill.append(self.rows(rows))

    def drafted(self, seconds: float, first: bool = True, sequences: int = 1) -> None:
        """Billed as in the table."""
        self.bill.append(self.drafting(1) if first else self.drafting(2) - self.drafting(1))

    def full_depth(self, first: int, tokens: int) -> float:
        """Seconds of so many passes of one row from position ``first`` on."""
        total = 0.0
        for at in range(first, first + tokens):
            self.at_position(at)
            total += self.rows(1)
        return total


@dataclass(frozen=True)
class SteadyVerified(Verified):
    """Verified decoding whose every decision follows from the text and the cost table. Remembers its texts only if it is
    ``learning``."""

    learning: bool = False
    bill: list[float] = field(default_factory=list, compare=False)

    def on_finished(self, tokens: Sequence[int]) -> None:
        """Remembered, or not."""
        if self.learning:
            super().on_finished(tokens)

    def _costs(self, model: Model) -> CostModel:
        drafting = None if self.exits is None else self.exits.drafting(model.backbone)
        known = model.notes.setdefault("steady costs", {})
        if (key := drafting.key if drafting else "") not in known:
            known[key] = measure(model.backbone, drafting.try_once if drafting else None)
        found = known[key]
        return SteadyCosts(
            found.pass_seconds, found.draft_seconds, found.further_seconds, found.position_seconds, bill=self.bill
        )


def steadily(
    model: Model, ids: Ids, tokens: int, exits: Exits | None, history: History | None = None, learning: bool = False
) -> dict[str, Any]:
    """One text by the cost table: tokens, rounds, and how many times faster than full depth, the prompt apart."""
    policy = SteadyVerified(exits, history=history, learning=learning)
    found = generate(model, ids, policy, max_new_tokens=tokens)
    costs = SteadyVerified(exits)._costs(model)
    assert isinstance(costs, SteadyCosts)
    full = costs.full_depth(len(ids), max(0, len(found.token_ids) - 1))
    return {"tokens": len(found.token_ids), "rounds": found.counters.rounds, "ratio": full / max(sum(policy.bill), 1e-9)}


def with_history(model: Model, path: Path) -> History | None:
    """A history of this model's tokenizer; None without a tokenizer."""
    if model.tokenizer is None:
        return None
    fingerprint = tokenizer_fingerprint(model.tokenizer)
    return History.open(path, fingerprint=fingerprint, vocabulary=model.backbone.spec.vocabulary)


def over_repetitions(
    model: Model, prompts: Sequence[Ids], tokens: int, exits: Exits, progress: Progress
) -> list[dict[str, Any]]:
    """Tokens a pass when the same prompts come for the first, second, ... time, with a history that remembers."""
    found: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        history = with_history(model, Path(folder) / "history")
        for time_ in range(1, max(REPETITIONS) + 1 if history is not None else 1):
            rows = [steadily(model, ids, tokens, exits, history, learning=True) for ids in prompts]
            found += [{"repetition": time_, **curve_row(rows)}] if time_ in REPETITIONS else []
            progress(time_, max(REPETITIONS), "measuring repetitions")
    return found


def curve_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several texts: tokens a pass, and the median ratio with its 95% interval."""
    ratio = clustered_median([[row["ratio"] for row in rows]])
    return {
        "tokens_per_pass": sum(row["tokens"] for row in rows) / max(1, sum(row["rounds"] for row in rows)),
        "by_cost": [ratio.median, ratio.low, ratio.high],
    }
