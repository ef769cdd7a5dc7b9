"""Medians with an honest interval."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Interval:
    """A median and the bounds of its 95% bootstrap interval."""

    median: float
    low: float
    high: float


def bootstrap_median(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> Interval:
    """The median of ``values`` and its percentile bootstrap interval (Efron 1979), resampled with a fixed seed.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("a median needs at least one value.")
    dice = random.Random(seed)
    return _interval(values, [median(dice.choices(values, k=len(values))) for _ in range(resamples)])


def clustered_median(groups: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = 2000) -> Interval:
    """The median of all values, with an interval that knows they came in groups: groups are resampled, then values within.

    What is common to a group (the luck of one process) counts as often as there are groups, not as there are values: the
    two-stage bootstrap (Davison and Hinkley 1997, 3.8). With few groups it is still too narrow. One group is
    ``bootstrap_median``. Raises ValueError for no values.
    """
    filled = [group for group in groups if group]
    if len(filled) < 2:
        return bootstrap_median(filled[0] if filled else [], seed=seed, resamples=resamples)
    dice = random.Random(seed)

    def resampled() -> list[float]:
        chosen = dice.choices(filled, k=len(filled))
        return [value for group in chosen for value in dice.choices(group, k=len(group))]

    return _interval([value for group in filled for value in group], [median(resampled()) for _ in range(resamples)])


def _interval(values: Sequence[float], resampled: Sequence[float]) -> Interval:
    medians, last = sorted(resampled), len(resampled) - 1
    return Interval(median(values), medians[round(0.025 * last)], medians[round(0.975 * last)])
