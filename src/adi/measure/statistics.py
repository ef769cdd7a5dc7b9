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
    medians = sorted(median(dice.choices(values, k=len(values))) for _ in range(resamples))
    return Interval(median(values), medians[round(0.025 * (resamples - 1))], medians[round(0.975 * (resamples - 1))])
