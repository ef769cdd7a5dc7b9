"""Medians with intervals, distances of counts from a law, and how well a score predicts that something is right."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from adi.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Interval:
    """A median and the bounds of its 95% bootstrap interval."""

    median: float
    low: float
    high: float


def clustered_median(groups: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = 2000) -> Interval:
    """The median of all values and its percentile bootstrap interval (Efron 1979), resampled with a fixed seed.

    Values come in groups: groups are resampled, then values within. What is common to a group (such as one process) counts as
    often as there are groups, not as there are values: the two-stage bootstrap (Davison and Hinkley 1997, 3.8). With few groups
    it is still too narrow. Raises AdiError for no values.
    """
    filled, dice = [group for group in groups if group], random.Random(seed)
    if not filled:
        raise UsageError("a median needs at least one value.")

    def resampled() -> float:
        chosen = dice.choices(filled, k=len(filled)) if len(filled) > 1 else filled
        return median(value for group in chosen for value in dice.choices(group, k=len(group)))

    medians, last = sorted(resampled() for _ in range(resamples)), resamples - 1
    middle = median(value for group in filled for value in group)
    return Interval(middle, medians[round(0.025 * last)], medians[round(0.975 * last)])


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many members two sequences have in common before their first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def total_variation(counts: Mapping[Any, int], law: Mapping[Any, float]) -> float:
    """Half the sum of differences between the shares of ``counts`` and the chances of ``law``; in [0, 1]."""
    draws = sum(counts.values())
    return 0.5 * sum(abs(counts.get(x, 0) / draws - law.get(x, 0.0)) for x in {*counts, *law})


def variation_band(law: Mapping[Any, float], draws: int, risk: float = 1e-6) -> float:
    """What the total variation of ``draws`` independent draws of ``law`` from it exceeds with a chance of at most ``risk``.

    Its mean is at most ``1/2 sum sqrt(p (1 - p) / draws)`` (Jensen), and one draw more or less moves it by ``1 / draws`` at
    most, so it passes its mean by ``sqrt(ln(1 / risk) / (2 draws))`` that rarely (McDiarmid 1989).
    """
    mean = 0.5 * sum(math.sqrt(p * (1 - p) / draws) for p in law.values() if 0 < p < 1)
    return mean + math.sqrt(math.log(1 / risk) / (2 * draws))


def leading(law: Mapping[tuple[int, ...], Any], length: int) -> dict[tuple[int, ...], Any]:
    """The law (or the counts) of the first ``length`` members, from that of longer tuples."""
    found: dict[tuple[int, ...], Any] = {}
    for text, mass in law.items():
        found[text[:length]] = found.get(text[:length], 0) + mass
    return found


@dataclass(frozen=True)
class IsotonicCurve:
    """A chance that rises with a score: the scores in ``known``, ascending, and the chance at each."""

    known: Numbers
    levels: Numbers

    def chance(self, scores_N: ArrayLike) -> Numbers:
        """The chance at these scores, on straight lines between known ones, ``[N]``."""
        return np.interp(np.asarray(scores_N, np.float64), self.known, self.levels)

    def least(self, chance: float) -> float | None:
        """The least known score from which on the chance is at least that; None where it never is."""
        at = int(self.levels.searchsorted(chance))
        return float(self.known[at]) if at < len(self.known) else None


def isotonic_curve(scores_N: ArrayLike, right_N: ArrayLike) -> IsotonicCurve:
    """The mean of ``right_N`` by score, made to rise with it (Zadrozny and Elkan 2002); equal scores get one chance."""
    from scipy.optimize import isotonic_regression

    known, place_N, rows = np.unique(np.asarray(scores_N, np.float64), return_inverse=True, return_counts=True)
    right = np.bincount(place_N, weights=np.asarray(right_N, np.float64))
    return IsotonicCurve(known, isotonic_regression(right / rows, weights=rows).x)


def expected_calibration_error(chances_N: ArrayLike, right_N: ArrayLike, bins: int = 10) -> float:
    """Mean distance between stated chance and observed rate over equal bins, weighted by rows (Naeini et al. 2015)."""
    chance_N, right_N = np.asarray(chances_N, np.float64), np.asarray(right_N, np.float64)
    bin_N = (chance_N * bins).astype(int).clip(0, bins - 1)
    distances = np.bincount(bin_N, chance_N) - np.bincount(bin_N, right_N)  # times the rows of each bin
    return float(np.abs(distances).sum() / len(chance_N))


def auroc(scores_N: ArrayLike, right_N: ArrayLike) -> float | None:
    """Area under the ROC curve, which is Mann and Whitney's U over all pairs; None when only one class is there."""
    from scipy.stats import mannwhitneyu

    scores_N, right_N = np.asarray(scores_N, np.float64), np.asarray(right_N, bool)
    if right_N.all() or not right_N.any():
        return None
    pairs = int(right_N.sum()) * int((~right_N).sum())
    return float(mannwhitneyu(scores_N[right_N], scores_N[~right_N], method="asymptotic").statistic) / pairs


def weighted_auroc(score_N: ArrayLike, right_N: ArrayLike, weight_SN: Numbers) -> tuple[Numbers, Numbers]:
    """Pairs of a right and a wrong row in which the right one has the higher score (ties count half), and all pairs, ``[S]``
    each, with rows weighed in S ways, such as by a bootstrap."""
    known, place_N = np.unique(score_N, return_inverse=True)
    right_N = np.asarray(right_N, bool)
    right_SK, wrong_SK = (
        np.stack([np.bincount(place_N, row * kind, len(known)) for row in weight_SN]) for kind in (right_N, ~right_N)
    )
    won_S = (right_SK * (wrong_SK.cumsum(1) - wrong_SK / 2)).sum(1)
    return won_S, right_SK.sum(1) * wrong_SK.sum(1)


def logistic_weights(x_NF: Numbers, right_N: Any, ridge: float = 1e-6) -> Numbers:
    """Logistic regression: the weights of features by which ``right_N`` is likeliest, less half of ``ridge`` times their square
    for each row."""
    from scipy.optimize import minimize
    from scipy.special import expit

    def loss(weight_F: Numbers) -> tuple[float, Numbers]:
        logit_N = x_NF @ weight_F
        slope_F = (expit(logit_N) - right_N) @ x_NF / len(x_NF) + ridge * weight_F
        return float((np.logaddexp(0, logit_N) - right_N * logit_N).mean() + ridge / 2 * weight_F @ weight_F), slope_F

    return np.asarray(minimize(loss, np.zeros(x_NF.shape[1]), jac=True).x)
