"""``Probe``: a small network per exit that has learned when going deeper would not change the token.

Its target is the oracle's: the exit's token against full depth's. ``state`` networks read the state alone, so they may
run before any head; ``joint`` ones read what the head predicts as well. Learned halting: ACT (Graves 2016), PonderNet
(Banino et al. 2021); a classifier on the state that stops a decoder early: CALM (Schuster et al. 2022).

``gate`` networks are a looped model's own halting gate, read after each of its turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from adi.errors import UsageError
from adi.exits.signals import Prediction, lumped_entropy, require_signal

if TYPE_CHECKING:
    from torch import Tensor

    from adi.model.looped import LoopedForCausalLM

KINDS = {"state_probe": "state", "joint_probe": "joint", "gate": "gate"}  # signals, and which of a probe's networks they read
NETWORKS = {"probe": "adi triggers --save DIR fits one", "gate": "adi.bare_exits of a looped model has one"}
HEAD_FEATURES = 6
LEAST_LOG = -30.0


@dataclass(frozen=True)
class Net:
    """``skip_F . x + out_H . relu(in_HF x + inner_H) + bias``, the logit of being right; without hidden units a logistic
    regression. A gate has silu in the place of relu."""

    skip_F: Tensor
    in_HF: Tensor
    inner_H: Tensor
    out_H: Tensor
    bias: Tensor

    def logit(self, x_TF: Tensor, silu: bool = False) -> Tensor:
        """Log-odds, ``[T]``."""
        import torch.nn.functional as F  # noqa: N812

        inner_TH = F.linear(x_TF, self.in_HF, self.inner_H)
        return x_TF @ self.skip_F + (F.silu(inner_TH) if silu else inner_TH.relu()) @ self.out_H + self.bias

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Probe:
    """Networks by depth: those on the state, and those on the state and the head; or a looped model's gate."""

    state: Mapping[int, Net] = field(default_factory=dict)
    joint: Mapping[int, Net] = field(default_factory=dict)
    gate: Mapping[int, Net] = field(default_factory=dict)

    def chance(self, name: str, depth: int, hidden_TD: Tensor, predict: Callable[[], Prediction] | None = None) -> Tensor:
        """The chance that the exit's token at T rows is full depth's, ``[T]``; ``predict`` is called where the head is read."""
        x = state_features(hidden_TD)
        if name == "joint_probe":
            assert predict is not None
            x = joint_features(hidden_TD, predict())
        nets: Mapping[int, Net] = getattr(self, KINDS[name])
        return nets[depth].logit(x, silu=name == "gate").sigmoid()

    def tensors(self) -> dict[str, Tensor]:
        """Everything, named ``kind.depth.weight``."""
        nets = {f"{kind}.{depth}": net for kind in KINDS.values() for depth, net in getattr(self, kind).items()}
        return {f"{place}.{name}": tensor for place, net in nets.items() for name, tensor in net.tensors().items()}


def gate_probe(model: LoopedForCausalLM, depths: Sequence[int], price: float | None) -> Probe | None:
    """The halting gate of a looped model as a probe at these depths, its final norm and the price folded into the weights;
    None where the gate needs a price and there is none."""
    import torch

    config, gate = model.config, model.gate
    if gate.priced and price is None and config.price_range is None:
        return None
    price = config.judged_price(price)
    weights = (model.model.norm.weight, gate.hidden.weight, gate.hidden.bias, gate.stop.weight, gate.stop.bias)
    gain_D, in_HF, inner_H, out_1H, bias = (w.detach().float().cpu() for w in weights)
    if gate.priced:
        inner_H = inner_H + in_HF[:, -1] * torch.tensor(float(price or 0)).log()
    width = len(gain_D)
    net = Net(torch.zeros(width), (in_HF[:, :width] * gain_D).contiguous(), inner_H, out_1H[0].clone(), bias)
    return Probe(gate=dict.fromkeys(depths, net))


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
    """Shapes of a ``Net`` of this kind for a model of ``width``, with ``hidden`` units."""
    features = width + (HEAD_FEATURES if kind == "joint" else 0)
    return {"skip_F": (features,), "in_HF": (hidden, features), "inner_H": (hidden,), "out_H": (hidden,), "bias": (1,)}


def require_network(name: str, probe: Probe | None) -> None:
    """UsageError where a signal reads a network that is not there, in the exits' probe or at all."""
    kind = require_signal(name).reads
    if kind in NETWORKS and kind not in networks_of(probe):
        raise UsageError(f"signal {name!r} reads a {kind}, and these exits have none; {NETWORKS[kind]}.")


def networks_of(probe: Probe | None) -> set[str]:
    """Which of ``NETWORKS`` there are."""
    there = {} if probe is None else {"probe": probe.state, "gate": probe.gate}
    return {kind for kind, nets in there.items() if nets}
