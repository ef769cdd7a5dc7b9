"""Greedy match: runs that must give full depth's text, where they diverge from it, and whether a tie explains that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from adi.decoding.teacher_forcing import KnownText, forced_pass
from adi.measure.statistics import common_prefix
from adi.model.load import Model


@dataclass(frozen=True)
class Divergence:
    """The first place where a text is not full depth's. ``margin`` is by how much the likeliest token leads there, in logits,
    ``gap`` by how much it leads the less likely of the two tokens, ``noise`` what a logit may be off by rounding."""

    prompt: int
    at: int
    full: int
    got: int
    margin: float
    gap: float
    noise: float
    explained: bool


@dataclass
class TextMatch:
    """Runs that must give full depth's text."""

    name: str
    runs: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def within(self) -> bool:
        """Whether ties explain all divergences."""
        return all(d.explained for d in self.divergences)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "within": self.within}

    def violations(self, where: str) -> list[str]:
        """Divergences that no tie explains, in sentences."""
        return [
            f"{where}: {self.name}: prompt {d.prompt} diverges from full depth at token {d.at} ({d.got} for {d.full}), no tie "
            f"(gap {d.gap:.2g}, noise {d.noise:.2g})"
            for d in self.divergences
            if not d.explained
        ]


def logits_after(model: Model, ids: Sequence[int]) -> Tensor:
    """The full model's logits after a text, by one full pass, ``[V]``."""
    (found,) = forced_pass(model.backbone, [KnownText(tuple(ids), first=len(ids) - 1)])
    return model.backbone.logits(found.deep_ND)[0]


def divergence(
    model: Model, prompt: int, ids: Sequence[int], full: Sequence[int], got: Sequence[int], noise: float
) -> Divergence | None:
    """None for equal texts. A tie explains it where rows were not found to be invariant and both tokens are nearer to the
    likeliest than twice the noise; a text that ends too early or too late is never explained."""
    at = common_prefix(full, got)
    if at == max(len(full), len(got)):
        return None
    if at == min(len(full), len(got)):
        a, b = (x[at] if at < len(x) else -1 for x in (full, got))
        return Divergence(prompt, at, a, b, 0.0, 0.0, noise, False)
    logits_V = logits_after(model, (*ids, *full[:at]))
    top = logits_V.topk(min(2, len(logits_V))).values
    gap = float(top[0] - min(logits_V[full[at]], logits_V[got[at]]))
    explained = model.backbone.spec.row_invariant is not True and gap <= 2 * noise
    return Divergence(prompt, at, full[at], got[at], float(top[0] - top[-1]), gap, noise, explained)
