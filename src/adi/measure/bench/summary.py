"""From outcomes to the figures of the result: one entry per system, per pair, and per system and size of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean, median
from typing import Any

from adi.measure.bench.outcomes import BatchOutcome, accepted_share
from adi.measure.bench.worker import System
from adi.measure.statistics import clustered_median, common_prefix
from adi.prompts import PromptItem

NUMBER_FORMAT = {"llama.cpp": "int4", "llama.cpp-lookup": "int4", "gguf": "int4", "economize": "fp32"}


def part_of(prompt: int, restarts: int) -> int:
    """Which of a system's processes runs this prompt: they take turns, so that each has some of every kind."""
    return prompt % restarts


def interval(values: Mapping[int, float], restarts: int, seed: int) -> dict[str, float]:
    """The median of figures by prompt and its bounds, resampled by restart and then by prompt."""
    groups = [[value for p, value in values.items() if part_of(p, restarts) == part] for part in range(restarts)]
    return asdict(clustered_median(groups, seed=seed))


def run_entry(system: System, systems: Sequence[System], items: Sequence[PromptItem], restarts: int = 1) -> dict[str, Any]:
    """A system's figures, or its error. ``match`` compares with full depth, whose name is ``match_with``."""
    known = {"name": system.name, **system.details}
    if system.error is not None or not system.outcomes:
        empty = dict.fromkeys(("tokens_per_second", "ttft_seconds", "peak_bytes", "match", "per_category"))
        return {**known, **empty, "error": system.error or "it gave no result"}
    prompts = sorted(system.outcomes)
    every = [o for p in prompts for o in system.outcomes[p]]
    rounds = [len(o.token_ids) / o.rounds for o in every if o.rounds]
    reference = _reference(system, systems)
    found = interval({p: speed(system, p) for p in prompts}, restarts, system.setting.seed)
    return {
        **known,
        "error": None,
        "peak_bytes": system.peak_bytes,
        "resident_bytes": system.resident_bytes,
        "tokens_per_round": median(rounds) if rounds else None,
        "accepted_share": accepted_share(every),
        **_figures(system, reference, prompts),
        "tokens_per_second_low": found["low"],
        "tokens_per_second_high": found["high"],
        "match_with": reference.name if reference else None,
        "per_category": {name: _figures(system, reference, mine) for name, mine in _categories(items, prompts).items()},
        **({"sweep": system.sweep.to_json()} if system.sweep else {}),
    }


def ratio_entries(systems: Sequence[System], items: Sequence[PromptItem], seed: int, restarts: int = 1) -> list[dict[str, Any]]:
    """adi's modes against all others, each pair on the prompts that both ran."""
    return [
        ratio_entry(a, b, items, seed, restarts)
        for a in systems
        for b in systems
        if a is not b and a.name.startswith("adi:") and set(a.outcomes) & set(b.outcomes)
    ]


def ratio_entry(a: System, b: System, items: Sequence[PromptItem], seed: int, restarts: int = 1) -> dict[str, Any]:
    """How many times faster ``a`` is: medians over prompts of paired ratios, with their interval; above 1 ``a`` is faster.

    The figures named ``ttft`` are how many times sooner its first token comes.
    """
    both = sorted(set(a.outcomes) & set(b.outcomes))
    ratios = {p: speed(a, p) / speed(b, p) for p in both}
    sooner = interval({p: ttft(b, p) / ttft(a, p) for p in both}, restarts, seed)
    return {
        "a": a.name,
        "b": b.name,
        **interval(ratios, restarts, seed),
        **{f"ttft_{bound}": value for bound, value in sooner.items()},
        "per_category": {name: median(ratios[p] for p in mine) for name, mine in _categories(items, both).items()},
    }


def batch_entries(systems: Sequence[System], restarts: int, seed: int) -> list[dict[str, Any]]:
    """One entry for each system and size of batches: tokens per second, the median over groups; ``against`` every other system
    how many times as many, by paired groups, with the interval. ``same``: every prompt got the tokens that it got alone.
    """
    found = [{"name": s.name, "batch": None, "error": s.batch_error} for s in systems if s.batch_error is not None]
    sizes = sorted({size for s in systems for size in s.batches})
    return found + [_batch_entry(s, systems, size, restarts, seed) for size in sizes for s in systems if s.batches.get(size)]


def _batch_entry(system: System, systems: Sequence[System], size: int, restarts: int, seed: int) -> dict[str, Any]:
    mine = {first: group.tokens_per_second for first, group in system.batches[size].items()}
    against = {}
    for other in systems:
        theirs = other.batches.get(size, {})
        if other is not system and (both := mine.keys() & theirs.keys()):
            ratios = {first: mine[first] / theirs[first].tokens_per_second for first in sorted(both)}
            against[other.name] = interval(ratios, restarts, seed)
    return {
        "name": system.name,
        "batch": size,
        "groups": len(mine),
        "error": None,
        "tokens_per_second": median(mine.values()),
        "against": against,
        "same": all(_as_alone(system, first, group, restarts) for first, group in system.batches[size].items()),
    }


def _as_alone(system: System, first: int, group: BatchOutcome, restarts: int) -> bool:
    prompts = range(first, first + restarts * len(group.token_ids), restarts)
    return all(system.outcomes[p][0].token_ids == ids for p, ids in zip(prompts, group.token_ids, strict=True))


def speed(system: System, prompt: int) -> float:
    """Tokens per second on one prompt, from the call to the last token: the median of its repeats."""
    return median(o.tokens_per_second for o in system.outcomes[prompt])


def ttft(system: System, prompt: int) -> float:
    """Seconds to the first token of one prompt: the median of its repeats."""
    return median(o.ttft_seconds for o in system.outcomes[prompt])


def _figures(system: System, reference: System | None, prompts: Sequence[int]) -> dict[str, Any]:
    return {
        "tokens_per_second": median(speed(system, p) for p in prompts),
        "ttft_seconds": median(ttft(system, p) for p in prompts),
        "match": agreement(system, reference, prompts, lambda a, b: float(a == b)),
        "match_tokens": agreement(system, reference, prompts, leading_share),
    }


def agreement(
    system: System, reference: System | None, prompts: Sequence[int], compare: Callable[[Sequence[int], Sequence[int]], float]
) -> float | None:
    """The mean over prompts of a comparison with the reference's tokens; None without one."""
    both = [p for p in prompts if reference is not None and p in reference.outcomes]
    if reference is None or not both:
        return None
    return mean(compare(system.outcomes[p][0].token_ids, reference.outcomes[p][0].token_ids) for p in both)


def leading_share(a: Sequence[int], b: Sequence[int]) -> float:
    """The share of the longer text that both have in common before their first difference."""
    longer = max(len(a), len(b))
    return common_prefix(a, b) / longer if longer else 1.0


def _reference(system: System, systems: Sequence[System]) -> System | None:
    """Full depth at the same precision, else the first full depth there is: for other number formats a mere comparison."""
    last = system.name.rsplit(":", 1)[-1]
    precision = NUMBER_FORMAT.get(last, last)
    full = [s for s in systems if s.name.startswith("adi:full:") and s.error is None]
    return next((s for s in full if s.name == f"adi:full:{precision}"), full[0] if full else None)


def _categories(items: Sequence[PromptItem], prompts: Sequence[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for p in prompts:
        found.setdefault(items[p].category, []).append(p)
    return found
