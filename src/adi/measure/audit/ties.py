"""Where two texts part, and whether a tie explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adi.model.backbone import Rows
from adi.model.load import Model


@dataclass(frozen=True)
class Divergence:
    """The first place where a text is not full depth's. ``margin`` is by how much the likeliest token leads there, in logits,
    ``gap`` by how much it leads the less likely of the two that were said, ``noise`` what a logit may be off by rounding."""

    prompt: int
    at: int
    full: int
    got: int
    margin: float
    gap: float
    noise: float
    explained: bool


def logits_after(model: Model, ids: Sequence[int]) -> Tensor:
    """The full model's logits after a text, by one full pass, ``[V]``."""
    backbone = model.backbone
    cache = backbone.new_cache()
    (states,) = backbone.forward([Rows(cache, 0, tuple(ids), None)], 0, backbone.spec.layers)
    logits_V = backbone.logits(states.hidden_TD[-1:])[0]
    cache.close()
    return logits_V


def divergence(
    model: Model, prompt: int, ids: Sequence[int], full: Sequence[int], said: Sequence[int], noise: float
) -> Divergence | None:
    """None where both say the same. A tie explains it where rows were not found to be invariant and both tokens are nearer to
    the likeliest than twice the noise; a text that ends too early or too late is never explained."""
    at = next((i for i, (a, b) in enumerate(zip(full, said, strict=False)) if a != b), None)
    if at is None:
        if len(full) == len(said):
            return None
        at = min(len(full), len(said))
        a, b = (x[at] if at < len(x) else -1 for x in (full, said))
        return Divergence(prompt, at, a, b, 0.0, 0.0, noise, False)
    logits_V = logits_after(model, (*ids, *full[:at]))
    top = logits_V.topk(min(2, len(logits_V))).values
    gap = float(top[0] - min(logits_V[full[at]], logits_V[said[at]]))
    explained = model.backbone.spec.row_invariant is not True and gap <= 2 * noise
    return Divergence(prompt, at, full[at], said[at], float(top[0] - top[-1]), gap, noise, explained)
