"""``Probe``: a small network per exit that has learned when going deeper would not change the token.

Its target is the oracle's: the exit's token against full depth's. ``state`` networks read the state alone, so they may
run before any head; ``joint`` ones read what the head predicts as well. Learned halting: ACT (Graves 2016), PonderNet
(Banino et al. 2021); a classifier on the state that stops a decoder early: CALM (Schuster et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from adi.exits.signals import Prediction, lumped_entropy

if TYPE_CHECKING:
    from torch import Tensor

KINDS = {"state_probe": "state", "joint_probe": "joint"}  # signals, and which of a probe's networks they read
HEAD_FEATURES = 6
LEAST_LOG = -30.0


@dataclass(frozen=True)
class Net:
    """``skip_F . x + out_H . relu(in_HF x + inner_H) + bias``, the logit of being right; without hidden units a logistic
    regression."""

    skip_F: Tensor
    in_HF: Tensor
    inner_H: Tensor
    out_H: Tensor
    bias: Tensor

    def logit(self, x_TF: Tensor) -> Tensor:
        """Log-odds, ``[T]``."""
        import torch

        hidden_TH = torch.nn.functional.linear(x_TF, self.in_HF, self.inner_H).relu()
        return x_TF @ self.skip_F + hidden_TH @ self.out_H + self.bias

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Probe:
    """Networks by depth: those on the state, and those on the state and the head."""

    state: Mapping[int, Net]
    joint: Mapping[int, Net]

    def chance(self, name: str, depth: int, hidden_TD: Tensor, predict: Callable[[], Prediction]) -> Tensor:
        """The chance that the exit's token at T rows is full depth's, ``[T]``; ``predict`` is called where the head is read."""
        x = state_features(hidden_TD) if name == "state_probe" else joint_features(hidden_TD, predict())
        nets: Mapping[int, Net] = getattr(self, KINDS[name])
        return nets[depth].logit(x).sigmoid()

    def tensors(self) -> dict[str, Tensor]:
        """Everything, named ``kind.depth.weight``."""
        nets = {f"{kind}.{depth}": net for kind in KINDS.values() for depth, net in getattr(self, kind).items()}
        return {f"{place}.{name}": tensor for place, net in nets.items() for name, tensor in net.tensors().items()}


def state_features(hidden_TD: Tensor) -> Tensor:
    """The states at root mean square 1, ``[T, D]``."""
    import torch

    x = hidden_TD.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def joint_features(hidden_TD: Tensor, head: Prediction) -> Tensor:
    """State and head side by side, ``[T, D + 6]``."""
    import torch

    return torch.cat([state_features(hidden_TD), head_features(head)], -1)


def head_features(head: Prediction) -> Tensor:
    """What a head predicts, ``[T, 6]``: log-probabilities of its first and second token and of the tail, probabilities of the
    first token and of the tail, entropy with the tail as one token."""
    import torch

    rows = head.rows
    logs = [values.clamp_min(LEAST_LOG) for values in (rows.first_T, rows.second_T, rows.tail_T)]
    return torch.stack([*logs, logs[0].exp(), logs[2].exp(), lumped_entropy(head)], -1).float()


def network_shapes(kind: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a ``Net`` of this kind ("state" or "joint") for a model of ``width``, with ``hidden`` units."""
    features = width + (HEAD_FEATURES if kind == "joint" else 0)
    return {"skip_F": (features,), "in_HF": (hidden, features), "inner_H": (hidden,), "out_H": (hidden,), "bias": (1,)}
