"""From what contestants gave to the figures of the result: one entry per contestant, one per pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from adi.measure.bench.sweep import accepted_share
from adi.measure.bench.worker import System
from adi.measure.statistics import Interval, clustered_median
from adi.prompts import PromptItem

NUMBER_FORMAT = {"llama.cpp": "int4", "llama.cpp-lookup": "int4", "gguf": "int4", "economize": "fp32"}


def part_of(prompt: int, restarts: int) -> int:
    """Which of the processes that a contestant had runs this prompt: they take turns, so that each has some of every kind."""
    return prompt % restarts


def interval(values: Mapping[int, float], restarts: int, seed: int) -> Interval:
    """The median of figures by prompt, resampled by restart and then by prompt."""
    groups = [[value for p, value in values.items() if part_of(p, restarts) == part] for part in range(restarts)]
    return clustered_median(groups, seed=seed)


def run_entry(contestant: System, all_: Sequence[System], items: Sequence[PromptItem], restarts: int = 1) -> dict[str, Any]:
    """A contestant's figures, or its error. ``match`` compares with full depth, whose name is ``match_with``."""
    known = {"name": contestant.name, **contestant.details}
    if contestant.error is not None or not contestant.outcomes:
        empty = dict.fromkeys(("tokens_per_second", "ttft_seconds", "peak_bytes", "match", "per_category"))
        return {**known, **empty, "error": contestant.error or "it gave no result"}
    prompts = sorted(contestant.outcomes)
    every = [o for p in prompts for o in contestant.outcomes[p]]
    rounds = [len(o.token_ids) / o.rounds for o in every if o.rounds]
    reference = _reference(contestant, all_)
    found = interval({p: speed(contestant, p) for p in prompts}, restarts, contestant.setting.seed)
    return {
        **known,
        "error": None,
        "peak_bytes": contestant.peak_bytes,
        "tokens_per_round": median(rounds) if rounds else None,
        "accepted_share": accepted_share(every),
        **_figures(contestant, reference, prompts),
        "tokens_per_second_low": found.low,
        "tokens_per_second_high": found.high,
        "match_with": reference.name if reference else None,
        "per_category": {name: _figures(contestant, reference, mine) for name, mine in _categories(items, prompts).items()},
        **({"sweep": contestant.sweep} if contestant.sweep else {}),
    }


def ratio_entries(
    contestants: Sequence[System], items: Sequence[PromptItem], seed: int, restarts: int = 1
) -> list[dict[str, Any]]:
    """adi's modes against everybody else, each pair on the prompts that both ran."""
    return [
        ratio_entry(a, b, items, seed, restarts)
        for a in contestants
        for b in contestants
        if a is not b and a.name.startswith("adi:") and set(a.outcomes) & set(b.outcomes)
    ]


def ratio_entry(a: System, b: System, items: Sequence[PromptItem], seed: int, restarts: int = 1) -> dict[str, Any]:
    """How many times faster ``a`` is: medians over prompts of paired ratios, with their interval; above 1 ``a`` wins.

    The figures named ``ttft`` say how many times sooner its first token comes.
    """
    both = sorted(set(a.outcomes) & set(b.outcomes))
    ratios = {p: speed(a, p) / speed(b, p) for p in both}
    sooner = {p: first(b, p) / first(a, p) for p in both}
    found, waited = (interval(values, restarts, seed) for values in (ratios, sooner))
    return {
        "a": a.name,
        "b": b.name,
        "median": found.median,
        "low": found.low,
        "high": found.high,
        "ttft_median": waited.median,
        "ttft_low": waited.low,
        "ttft_high": waited.high,
        "per_category": {name: median(ratios[p] for p in mine) for name, mine in _categories(items, both).items()},
    }


def speed(contestant: System, prompt: int) -> float:
    """Tokens per second on one prompt, from the call to the last token: the median of its repeats."""
    return median(o.tokens_per_second for o in contestant.outcomes[prompt])


def first(contestant: System, prompt: int) -> float:
    """Seconds to the first token of one prompt: the median of its repeats."""
    return median(o.ttft_seconds for o in contestant.outcomes[prompt])


def _figures(contestant: System, reference: System | None, prompts: Sequence[int]) -> dict[str, Any]:
    return {
        "tokens_per_second": median(speed(contestant, p) for p in prompts),
        "ttft_seconds": median(first(contestant, p) for p in prompts),
        "match": agreement(contestant, reference, prompts, lambda a, b: float(a == b)),
        "match_tokens": agreement(contestant, reference, prompts, leading_share),
    }


def agreement(
    contestant: System,
    reference: System | None,
    prompts: Sequence[int],
    compare: Callable[[Sequence[int], Sequence[int]], float],
) -> float | None:
    """The mean over prompts of a comparison with the reference's tokens; None without one."""
    both = [p for p in prompts if reference is not None and p in reference.outcomes]
    if reference is None or not both:
        return None
    return mean(compare(contestant.outcomes[p][0].token_ids, reference.outcomes[p][0].token_ids) for p in both)


def leading_share(a: Sequence[int], b: Sequence[int]) -> float:
    """The share of the longer text that both say alike before their first difference."""
    longer = max(len(a), len(b))
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same / longer if longer else 1.0


def _reference(contestant: System, all_: Sequence[System]) -> System | None:
    """Full depth at the same precision, else the first full depth there is: for other number formats a mere comparison."""
    rest = contestant.name.rsplit(":", 1)[-1]
    precision = NUMBER_FORMAT.get(rest, rest)
    full = [c for c in all_ if c.name.startswith("adi:full:") and c.error is None]
    return next((c for c in full if c.name == f"adi:full:{precision}"), full[0] if full else None)


def _categories(items: Sequence[PromptItem], prompts: Sequence[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for p in prompts:
        found.setdefault(items[p].category, []).append(p)
    return found
