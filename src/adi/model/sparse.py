"""``SplLinear``: a linear layer whose units speak only where the input matches their prototype by more than their gate costs.

Sparse Proto Linear, from its published formulas: unit j gives ``m_j silu(mu_j x + b_j)``, ``m_j = [r_j > 0]``, with the
routing logit ``r_j = x p_j / sqrt(D) - cost_j``. The mask is hard and no gradient passes it: prototypes p and gates learn from
a loss of their own (``training.looped``), mu and b from the main one. All units are computed; what is sparse is which speak.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

SCALE = 0.02  # at which prototypes start
SPARSE = ("none", "relu", "mlp", "all")  # where a looped model is sparse: ReLU in its MLPs, or units with prototypes


class Router(nn.Module):
    """Routing logits ``[..., units]`` of inputs ``[..., inputs]``; the inputs get no gradient from them.

    Costs are gates divided by the largest of them, where that passes 1. (The published division begins at once: of gates that
    start at zero the first step of training makes costs of plus and minus 1.) ``bar`` is what benefits must pass under the rule
    "price" (``training.looped``).
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.empty(units, inputs))
        self.gates = nn.Parameter(torch.empty(units))
        self.bar: Tensor
        self.register_buffer("bar", torch.ones(()))
        self.reset()

    def reset(self) -> None:
        nn.init.normal_(self.prototypes, std=SCALE)
        nn.init.zeros_(self.gates)

    def forward(self, x: Tensor) -> Tensor:
        cost = self.gates / self.gates.detach().abs().max().clamp_min(1.0)
        route: Tensor = F.linear(x.detach(), self.prototypes) * self.prototypes.shape[1] ** -0.5 - cost
        return route


class Speaks(nn.Module):
    """Which units speak, of their routing logits: a module, so that engines see what it is given."""

    def forward(self, route: Tensor) -> Tensor:
        return route > 0


class SplLinear(nn.Module):
    """In the place of ``nn.Linear(inputs, units)``."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(units, inputs))
        self.bias = nn.Parameter(torch.empty(units))
        self.router, self.speaks = Router(inputs, units), Speaks()
        self.reset(SCALE)

    def reset(self, scale: float) -> None:
        nn.init.normal_(self.weight, std=scale)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        spoken: Tensor = self.speaks(self.router(x)) * F.silu(F.linear(x, self.weight, self.bias))
        return spoken


def make_sparse(block: nn.Module, where: str, width: int, inner: int) -> None:
    """Put ``SplLinear`` in the place of a Llama block's up projection and, of "all", of its queries, keys, values, outputs."""
    if where in ("mlp", "all"):
        block.mlp.up_proj = SplLinear(width, inner)  # type: ignore[union-attr]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj") if where == "all" else ():
        setattr(block.self_attn, name, SplLinear(width, width))
