"""From how sure something looks to how often it is right: isotonic regression, temperature, and how far off a chance is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adi.exits.signals import Measured, Prediction

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[np.float64]]

BINS = 10
TEMPERATURES = tuple(round(2 ** (step / 4), 4) for step in range(-5, 6))  # 0.42 to 2.4, a fifth apart
CHUNK = 256


@dataclass(frozen=True)
class Rising:
    """A chance that rises with a signal: the signal's ``known`` values, ascending, and the chance at each."""

    known: Numbers
    levels: Numbers

    def of(self, sure_N: Tensor) -> Tensor:
        """The chance at these values, on straight lines between known ones, ``[N]``."""
        import numpy as np

        return torch.from_numpy(np.interp(sure_N.double().numpy(), self.known, self.levels))

    def least(self, chance: float) -> float | None:
        """The least known value from which on the chance is at least that; None where it never is."""
        at = int(self.levels.searchsorted(chance))
        return float(self.known[at]) if at < len(self.known) else None


def isotonic(sure_N: Tensor, right_N: Tensor) -> Rising:
    """How often rows were right, made to rise with the signal (Zadrozny and Elkan 2002); equal signals get one chance."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    known, place, rows_at = np.unique(sure_N.double().numpy(), return_inverse=True, return_counts=True)
    right = np.bincount(place, weights=right_N.double().numpy())
    return Rising(known, isotonic_regression(right / rows_at, weights=rows_at).x)


def expected_calibration_error(chance_N: Tensor, right_N: Tensor, bins: int = BINS) -> float:
    """Mean distance between stated chance and observed rate over equal bins, weighted by rows (Naeini et al. 2015)."""
    place_N = (chance_N * bins).long().clamp(0, bins - 1)
    total = 0.0
    for b in range(bins):
        here = place_N == b
        if here.any():
            total += float((chance_N[here].mean() - right_N[here].float().mean()).abs() * here.sum())
    return total / len(chance_N)


def auroc(sure_N: Tensor, right_N: Tensor) -> float | None:
    """Area under the ROC curve by rank sums (Mann-Whitney), ties counting half; None when only one class is there."""
    from scipy.stats import rankdata

    positives = int(right_N.sum())
    negatives = len(right_N) - positives
    if not positives or not negatives:
        return None
    ranks = rankdata(sure_N.double().numpy())
    above = float(ranks[right_N.numpy()].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


@dataclass(frozen=True)
class Heated:
    """A head's distribution at every one of ``TEMPERATURES``, ``[G, N]``: the surprise in nats at full depth's token, and the
    probability of the token that the exit names."""

    surprise_GN: Tensor
    top_GN: Tensor


def heated(said: Prediction | Measured, token_N: Tensor) -> Heated:
    """``softmax(log p / T)`` over shortlist and tail (temperature scaling, Guo et al. 2017); what is not in the shortlist is
    the tail, one class."""
    logs_NS = said.log_probs_TS.float().cpu()
    tail_N = said.rows.tail_T if isinstance(said, Measured) else said.tail_T
    logs_NC = logs_NS if tail_N is None else torch.cat([logs_NS, tail_N.float().cpu()[:, None]], 1)
    token_N = token_N.cpu()
    if said.ids_S is None:
        place_N = token_N
    else:
        ids_S = said.ids_S.cpu()
        found_N = torch.searchsorted(ids_S, token_N).clamp_max(len(ids_S) - 1)
        place_N = torch.where(ids_S[found_N] == token_N, found_N, torch.full_like(found_N, len(ids_S)))
    parts = []
    for rows in torch.arange(len(token_N)).split(CHUNK):
        own_N, top_N = logs_NC[rows, place_N[rows]], logs_NS[rows].amax(1)
        totals = [(logs_NC[rows] / heat).logsumexp(1) for heat in TEMPERATURES]
        surprise = [total - own_N / heat for total, heat in zip(totals, TEMPERATURES, strict=True)]
        top = [(top_N / heat - total).exp() for total, heat in zip(totals, TEMPERATURES, strict=True)]
        parts.append((torch.stack(surprise), torch.stack(top)))
    return Heated(torch.cat([s for s, _ in parts], 1), torch.cat([t for _, t in parts], 1))
