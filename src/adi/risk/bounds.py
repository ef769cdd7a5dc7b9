"""Which thresholds may be believed: tests of a mean loss, without any assumption on how losses are distributed.

A loss is one sequence's, in [0, 1]; sequences are exchangeable, tokens within one are not, so nothing here counts tokens.
Rules are given in an order, safest first, that no calibration loss had a say in.

* Learn then Test (Angelopoulos et al. 2021): each rule is a hypothesis "its risk is above the level"; tested one after the
  other at ``delta`` until the first that is not refuted (fixed-sequence testing), so the chance of believing any false one
  is at most ``delta``.
* p-values: Hoeffding-Bentkus (Bates et al. 2021), or betting (Waudby-Smith and Ramdas 2023), which sees small variances.
* Conformal risk control (Angelopoulos et al. 2022): the expected risk, over calibration and use, is at most the level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]
PValue = Callable[[Losses, float], float]


def hoeffding_bentkus(losses_N: Losses, level: float) -> float:
    """p-value of "the mean is above ``level``" for losses in [0, 1]: the smaller of Hoeffding's tail and Bentkus's.

    Proposition 1 of Bates et al. 2021, "Distribution-free, risk-controlling prediction sets".
    """
    count, mean = len(losses_N), float(losses_N.mean())
    if mean >= level:
        return 1.0
    hoeffding = math.exp(-count * _divergence(mean, level))
    bentkus = math.e * binomial_cdf(math.ceil(count * mean - 1e-9), count, level)
    return min(1.0, hoeffding, bentkus)


def betting(losses_N: Losses, level: float, delta: float = 0.05) -> float:
    """p-value of "the mean is above ``level``" by a gambler who bets that it is below, one loss after the other.

    Were the hypothesis true, no such gambler would expect to win, so by Ville's inequality one over the most he ever had is a
    p-value. The stakes are those of Waudby-Smith and Ramdas 2023 (as in Bates et al. 2021, section 3.1.3), chosen from the
    losses before and made for a test at ``delta``; the order of losses matters and must not depend on them.
    """
    count = len(losses_N)
    places = np.arange(1, count + 1)
    mean_N = (0.5 + np.cumsum(losses_N)) / (1 + places)
    spread_N = (0.25 + np.cumsum((losses_N - mean_N) ** 2)) / (1 + places)
    before_N = np.concatenate([[0.25], spread_N[:-1]])
    stake_N = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (count * before_N)))
    wealth_N = np.cumsum(np.log1p(stake_N * (level - losses_N)))  # level - loss > -1, so a stake of 1 cannot ruin
    return float(min(1.0, math.exp(-max(0.0, float(wealth_N.max())))))


PVALUES: dict[str, PValue] = {"betting": betting, "hoeffding-bentkus": hoeffding_bentkus}


def learn_then_test(losses_GN: Losses, level: float, delta: float, p_value: PValue = betting) -> int | None:
    """The boldest of G rules, safest first, before the first whose risk was not shown to be at most ``level``.

    None where not even the safest was. With probability 1 - ``delta`` over the draw of the N sequences, its true mean loss is
    at most ``level``.
    """
    chosen = None
    for place, losses_N in enumerate(losses_GN):
        if p_value(losses_N, level) > delta:
            break
        chosen = place
    return chosen


def conformal(losses_GN: Losses, level: float) -> int | None:
    """The boldest of G rules, safest first, that conformal risk control allows: (sum of losses + 1) / (N + 1) <= ``level``.

    Its proof wants losses that never fall as rules grow bolder, so a sequence's loss at a rule counts as the largest up to it.
    """
    risen_GN = np.maximum.accumulate(losses_GN, axis=0)
    corrected_G = (risen_GN.sum(1) + 1) / (losses_GN.shape[1] + 1)
    allowed = np.flatnonzero(corrected_G <= level)
    return int(allowed[-1]) if len(allowed) else None


def upper_bound(losses_N: Losses, delta: float, p_value: PValue = betting) -> float:
    """The smallest level, to a thousandth of itself, at which the mean would be shown to be at most it."""
    low, high = float(losses_N.mean()), 1.0
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(losses_N, middle) <= delta else (middle, high)
    return high


def sequences_needed(level: float, delta: float, method: str = "ltt") -> int:
    """So many sequences, all without loss, are the fewest that can certify ``level``.

    For Learn then Test: where one sequence in 1 / level is wholly wrong, fewer than this miss them all too often.
    """
    if method == "crc":
        return math.ceil(1 / level - 1e-9) - 1
    return math.ceil(math.log(delta) / math.log1p(-level))


def binomial_cdf(most: int, count: int, chance: float) -> float:
    """P(at most ``most`` of ``count`` successes)."""
    if most >= count:
        return 1.0
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(chance) + (count - k) * math.log1p(-chance)
        for k in range(most + 1)
    ]  # fmt: skip
    return min(1.0, math.fsum(math.exp(log) for log in logs))


def binomial_interval(successes: int, count: int, delta: float = 0.05) -> tuple[float, float]:
    """Clopper and Pearson's interval (1934) for a chance of which ``successes`` of ``count`` were seen, by bisection."""

    def solve(most: int, tail: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if binomial_cdf(most, count, min(max(middle, 1e-12), 1 - 1e-12)) > tail else (low, middle)
            )
        return low

    lower = solve(successes - 1, 1 - delta / 2) if successes else 0.0
    return lower, solve(successes, delta / 2) if successes < count else 1.0


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence, by weighted squares, that never rises: pooling of adjacent violators (Ayer et al. 1955)."""
    pools: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        pools.append([value, weight, 1])
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            mean, heavy, length = pools.pop()
            total = pools[-1][1] + heavy
            pools[-1] = [(pools[-1][0] * pools[-1][1] + mean * heavy) / total, total, pools[-1][2] + length]
    return [mean for mean, _, length in pools for _ in range(int(length))]


def _divergence(a: float, b: float) -> float:
    """Kullback-Leibler divergence between coins of chances ``a`` and ``b``, in nats."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)
