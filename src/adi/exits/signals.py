"""Confidence measures: pure functions of what a depth shows, one value per row.

* predictive entropy, margin and top probability read an exit head (BranchyNet, Teerapittayanon et al. 2016; CALM, Schuster
  et al. 2022);
* representation stability is the cosine between the states that enter and leave the last block run (CALM's "hidden-state
  saturation");
* activation sparsity reads that block's MLP activations: Hoyer's measure (Hoyer 2004) and the share of energy in the top
  units; of a sparse layer (``model.sparse``) it reads the routing logits, whose share above 0 and mean distance from 0 are
  signals too. Whether few or many active units mean sure is disputed: calibration says it, for each model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from adi.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

TOP_UNITS = 0.02


class HeadRows(NamedTuple):
    """What most readers want of a head's distribution at T rows, ``[T]`` each: place of the likeliest token, its
    log-probability, the next one's and the tail's, and the entropy in nats, the tail's tokens being alike."""

    place_T: Tensor
    first_T: Tensor
    second_T: Tensor
    tail_T: Tensor
    entropy_T: Tensor


class Prediction:
    """A head's distribution over the next token at T rows.

    ``log_probs_TS`` covers the tokens ``ids_S`` (None: all of the vocabulary, in order); ``tail_T`` is the log-probability
    that the token is one of the ``tail_size`` others. ``rows`` sum it up; an engine may have done so already.
    """

    def __init__(
        self,
        log_probs_TS: Tensor,
        ids_S: Tensor | None = None,
        tail_T: Tensor | None = None,
        tail_size: int = 0,
        rows: HeadRows | None = None,
    ) -> None:
        self.log_probs_TS, self.ids_S, self.tail_T, self.tail_size = log_probs_TS, ids_S, tail_T, tail_size
        self._rows = rows

    @property
    def rows(self) -> HeadRows:
        if self._rows is None:
            self._rows = summary(self.log_probs_TS, self.tail_T, self.tail_size)
        return self._rows

    @property
    def tokens_T(self) -> Tensor:  # noqa: N802, a shape
        """The likeliest tokens."""
        place_T = self.rows.place_T
        return place_T if self.ids_S is None else self.ids_S[place_T]


def summary(log_probs_TS: Tensor, tail_T: Tensor | None, tail_size: int) -> HeadRows:
    """A distribution over shortlist and tail in five numbers a row; of a single token, the tail is the next one."""
    import torch

    best, entropy_T = log_probs_TS.topk(min(2, log_probs_TS.shape[-1])), _own_entropy(log_probs_TS).sum(-1)
    first_T, place_T = best.values[..., 0], best.indices[..., 0]
    if tail_T is None:
        tail_T = torch.full_like(first_T, -math.inf)
    else:
        entropy_T = entropy_T + _spread(tail_T, tail_size)
    second_T = best.values[..., 1] if log_probs_TS.shape[-1] > 1 else tail_T
    return HeadRows(place_T, first_T, second_T, tail_T, entropy_T)


def entropy(prediction: Prediction) -> Tensor:
    """Predictive entropy in nats, ``[T]``: an upper bound for a shortlist, whose tail counts as spread evenly."""
    return prediction.rows.entropy_T


def lumped_entropy(prediction: Prediction) -> Tensor:
    """Entropy in nats with the whole tail as one token, ``[T]``: a lower bound for a shortlist.

    No signal of its own: a head that is sure of the tail, so of no token that it could name, looks sure to it.
    """
    tail_T = prediction.rows.tail_T
    return prediction.rows.entropy_T - _spread(tail_T, prediction.tail_size) + _own_entropy(tail_T)


def _spread(tail_T: Tensor, size: int) -> Tensor:
    """What a tail adds to the entropy where its tokens are alike; nothing where it has no mass."""
    import torch

    return tail_T.exp() * (math.log(max(size, 1)) - tail_T.clamp_min(torch.finfo(tail_T.dtype).min))


def _own_entropy(log_T: Tensor) -> Tensor:
    import torch

    return -(log_T.exp() * log_T.clamp_min(torch.finfo(log_T.dtype).min))


def top_probability(prediction: Prediction) -> Tensor:
    """Probability of the likeliest token, ``[T]``."""
    return prediction.rows.first_T.exp()


def margin(prediction: Prediction) -> Tensor:
    """Lead of the likeliest token over the next, ``[T]``, in probability.

    With a shortlist the whole tail counts as one rival, so the lead is negative where the tail outweighs every token.
    """
    import torch

    rows = prediction.rows
    return rows.first_T.exp() - torch.maximum(rows.second_T, rows.tail_T).exp()


def stability(before_TD: Tensor, hidden_TD: Tensor) -> Tensor:
    """Cosine between the states entering and leaving a block, ``[T]``; 0 where one of them is zero."""
    import torch

    return torch.nn.functional.cosine_similarity(before_TD.float(), hidden_TD.float(), dim=-1)


def hoyer(mlp_TF: Tensor) -> Tensor:
    """Hoyer sparsity of the MLP activations, ``[T]``: 0 for all units alike, 1 for a single active one."""
    import torch

    x = mlp_TF.float().abs()
    units = x.shape[-1]
    if units == 1:
        return torch.ones(x.shape[:-1], device=x.device)
    norm = x.square().sum(-1).sqrt()
    ratio = x.sum(-1) / norm.clamp_min(torch.finfo(x.dtype).tiny)
    return torch.where(norm > 0, (math.sqrt(units) - ratio) / (math.sqrt(units) - 1), torch.zeros_like(norm))


def top_energy(mlp_TF: Tensor) -> Tensor:
    """Share of the activations' energy (sum of squares) in their top 2% of units, ``[T]``; 0 for all zeros."""
    import torch

    energy = mlp_TF.float().square()
    top = energy.topk(max(1, round(TOP_UNITS * energy.shape[-1])), -1).values.sum(-1)
    total = energy.sum(-1)
    return torch.where(total > 0, top / total.clamp_min(torch.finfo(energy.dtype).tiny), torch.zeros_like(total))


def active_share(route_TF: Tensor) -> Tensor:
    """Share of units above 0, ``[T]``: of routing logits, those that speak."""
    return (route_TF > 0).float().mean(-1)


def route_margin(route_TF: Tensor) -> Tensor:
    """Mean distance of the routing logits from 0, where a unit would change its mind, ``[T]``."""
    return route_TF.float().abs().mean(-1)


def route_jump(route_TF: Tensor, before_TF: Tensor) -> Tensor:
    """How far routes moved since the turn before: Jensen and Shannon's divergence in nats of softmaxes over units, ``[T]``."""
    import torch

    p_TF, q_TF = route_TF.float().softmax(-1), before_TF.float().softmax(-1)
    middle_TF = (p_TF + q_TF) / 2
    parts = [torch.xlogy(part, part) - torch.xlogy(part, middle_TF) for part in (p_TF, q_TF)]
    return (parts[0] + parts[1]).sum(-1).clamp_min(0) / 2


def _probed(name: str) -> Callable[..., Tensor]:
    """What a learned probe (``exits.probe.Probe``) estimates, ``[T]``; its further arguments are those of ``Probe.chance``."""
    return lambda probe, *given: probe.chance(name, *given)


@dataclass(frozen=True)
class Signal:
    """One measure: what it reads ("head", "states", "mlp", "probe" or "gate"), and whether sure means a high or a low value;
    where that is ``open``, ``adi triggers`` finds it for a model, and its thresholds say it."""

    measure: Callable[..., Tensor]
    reads: str
    sure_is_high: bool
    about: str
    open: bool = False

    def sure(self, value: float, threshold: float, high: bool | None = None) -> bool:
        """Whether ``value`` is at least as sure as ``threshold``; never for NaN. ``high`` may say what sure means."""
        return value >= threshold if (self.sure_is_high if high is None else high) else value <= threshold


SIGNALS: dict[str, Signal] = {
    "entropy": Signal(entropy, "head", False, "predictive entropy of the exit head, nats"),
    "margin": Signal(margin, "head", True, "probability of the first token less the second's"),
    "top_probability": Signal(top_probability, "head", True, "probability of the first token"),
    "stability": Signal(stability, "states", True, "cosine between the last block's input and output"),
    "hoyer": Signal(hoyer, "mlp", True, "Hoyer sparsity of the last block's MLP activations"),
    "top_energy": Signal(top_energy, "mlp", True, "share of MLP energy in the top 2% of units"),
    "active_share": Signal(active_share, "mlp", True, "share of units above 0", open=True),
    "route_margin": Signal(route_margin, "mlp", True, "mean distance of units from 0", open=True),
    "state_probe": Signal(_probed("state_probe"), "probe", True, "chance of being right, learned from the state"),
    "joint_probe": Signal(_probed("joint_probe"), "probe", True, "chance of being right, learned from the state and the head"),
    "gate": Signal(_probed("gate"), "gate", True, "chance of halting, of a looped model's own gate"),
}


def require_signal(name: Any) -> Signal:
    """The signal of that name; UsageError lists the names there are."""
    if not isinstance(name, str) or name not in SIGNALS:
        raise UsageError(f"signal {name!r} is not known; choose one of {', '.join(SIGNALS)}.")
    return SIGNALS[name]
