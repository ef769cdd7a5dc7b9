"""What teaches prototypes and gates which units should speak: rules of sparse layers (``model.sparse``).

Each rule is a loss of the routing logits r of a layer's units at N tokens, ``[N, F]``, and of delta, the gradient of the main
loss at the units' outputs. It reaches prototypes and gates only, and comes of the same backward pass. All but "price" are
published: importance I = |delta|, surprise S = |delta| |x|, goodness G = n(I) (n(r) - n(S)) with n the division by the largest
over units; the entropy of softmax(r + G) in the code, of softmax(r - G) in the text; an earlier utility |delta| at price 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from adi.model.sparse import Router, SplLinear

Shaping = Literal["none", "entropy+", "entropy-", "utility", "price"]
SHARPNESS = 0.25  # of the rule "price": the distance from its threshold at which a unit is all but decided
DUAL_RATE = 0.05


def scaled(value_NF: Tensor) -> Tensor:
    """Divided by the largest over units."""
    return value_NF / value_NF.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(value_NF.dtype).tiny)


def goodness(route_NF: Tensor, delta_NF: Tensor) -> Tensor:
    """G; the token's norm in S is the same for all units, so n(S) = n(I)."""
    importance_NF = scaled(delta_NF.abs())
    return importance_NF * (scaled(route_NF) - importance_NF)


def benefit(delta_NF: Tensor) -> Tensor:
    """|delta| by its mean, so that a price of 1 is that of the mean unit whatever the scale of the loss."""
    return delta_NF.abs() / delta_NF.abs().mean().clamp_min(torch.finfo(delta_NF.dtype).tiny)


def entropy(route_NF: Tensor, delta_NF: Tensor, sign: float) -> Tensor:
    """Mean entropy over units of softmax(r + sign G). It puts no pressure on how many speak: a shift of all r leaves it."""
    logs_NF = (route_NF + sign * goodness(route_NF, delta_NF).detach()).log_softmax(-1)
    return -(logs_NF.exp() * logs_NF).sum(-1).mean()


def utility(route_NF: Tensor, delta_NF: Tensor, router: Router) -> Tensor:
    """Squared distance of sigmoid(r) from the benefit above a price of 1."""
    return F.mse_loss(route_NF.sigmoid(), (benefit(delta_NF) - 1).relu())


def price(route_NF: Tensor, delta_NF: Tensor, router: Router) -> Tensor:
    """Cross entropy of speaking against whether the benefit passes the router's ``bar``, which moves until the wanted share
    does (``Shaper.finish``)."""
    wanted_NF = ((benefit(delta_NF) - router.bar) / SHARPNESS).sigmoid()
    return F.binary_cross_entropy_with_logits(route_NF / SHARPNESS, wanted_NF)


RULES: dict[str, Callable[[Tensor, Tensor, Router], Tensor]] = {
    "entropy+": lambda route, delta, _: entropy(route, delta, 1.0),
    "entropy-": lambda route, delta, _: entropy(route, delta, -1.0),
    "utility": utility,
    "price": price,
}


class Shaper:
    """Adds a rule's gradients while the main loss goes backward through the sparse layers of a model that trains."""

    def __init__(self, model: nn.Module, rule: str, active: float) -> None:
        self.rule, self.active = rule, active
        self._seen: dict[SplLinear, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for layer in model.modules():
            if isinstance(layer, SplLinear):
                layer.register_forward_hook(self._watch)

    def _watch(self, layer: Any, given: tuple[Tensor, ...], spoken: Tensor) -> None:
        if spoken.requires_grad:
            spoken.register_hook(lambda delta: self._shape(layer, given[0].detach(), delta.detach()))

    def _shape(self, layer: SplLinear, x: Tensor, delta: Tensor) -> None:
        with torch.enable_grad():
            route_NF, delta_NF = layer.router(x).flatten(0, -2), delta.flatten(0, -2)
            RULES[self.rule](route_NF, delta_NF, layer.router).backward()
        route_NF = route_NF.detach()
        self._seen[layer].append(((route_NF > 0).float().mean(), goodness(route_NF, delta_NF).mean(0)))

    def finish(self) -> None:
        """After a backward pass: "price" moves each bar by dual ascent until its share of units speaks; under "entropy" a unit
        whose mean goodness is not above 0 keeps mu and b as they are."""
        for layer, calls in self._seen.items():
            share, good_F = (torch.stack(part).mean(0) for part in zip(*calls, strict=True))
            if self.rule == "price":
                layer.router.bar += DUAL_RATE * (share - self.active)
            elif self.rule.startswith("entropy") and layer.weight.grad is not None and layer.bias.grad is not None:
                layer.weight.grad *= (good_F > 0)[:, None]
                layer.bias.grad *= good_F > 0
        self._seen.clear()
