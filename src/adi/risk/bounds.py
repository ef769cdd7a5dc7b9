"""Which thresholds have a risk below a level: tests of a mean loss, without any assumption on how losses are distributed.

A loss is one sequence's, in [0, 1]; sequences are exchangeable, tokens within one are not, so nothing here counts tokens.
Rules are given in an order, safest first, that no calibration loss had a say in.

* Learn then Test (Angelopoulos et al. 2021): each rule is a hypothesis "its risk is above the level"; tested one after the
  other at ``delta`` until the first that is not refuted (fixed-sequence testing), so the chance of accepting any rule whose
  risk is above the level is at most ``delta``. The p-values are those of betting (Waudby-Smith and Ramdas 2023).
* Conformal risk control (Angelopoulos et al. 2022): the expected risk, over calibration and use, is at most the level.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]


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


def learn_then_test(losses_GN: Losses, level: float, delta: float) -> int | None:
    """The boldest of G rules, safest first, before the first whose risk was not shown to be at most ``level``.

    None where not even the safest was. With probability 1 - ``delta`` over the draw of the N sequences, its true mean loss is
    at most ``level``.
    """
    chosen = None
    for place, losses_N in enumerate(losses_GN):
        if betting(losses_N, level) > delta:
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


def sequences_needed(level: float, delta: float, method: str = "ltt") -> int:
    """So many sequences, all without loss, are the fewest that can certify ``level``.

    For Learn then Test: where one sequence in 1 / level is wholly wrong, fewer than this miss them all too often.
    """
    if method == "crc":
        return math.ceil(1 / level - 1e-9) - 1
    return math.ceil(math.log(delta) / math.log1p(-level))
