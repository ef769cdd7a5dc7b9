"""The sampling test: draws of a few tokens over a restricted vocabulary, against their exact law from full-depth logits."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adi.decoding.records import Step
from adi.decoding.sampler import Sampler, distribution, draw
from adi.decoding.sampling import Sampling
from adi.decoding.session import Session
from adi.measure.audit.ties import logits_after
from adi.measure.statistics import leading, total_variation, variation_band
from adi.model.load import Model

TOKENS = 3
RESTRICTED = Sampling(temperature=1.3, top_k=4)
RISK = 1e-6
EDGES = 2.0  # noises of a logit by which an edge between two tokens may have moved


@dataclass(frozen=True)
class Drawing:
    """What the draws of one way of drafting showed. ``variation`` from the exact law is judged by its ``band``, at the number
    of first tokens at which it is worst. ``foreseen``: draws that are token for token what their seed says by the exact law;
    ``near``: those that are not, with the number so near an edge between two tokens that rounding explains it."""

    drafts: str
    draws: int
    drafted: int
    accepted: int
    tokens: int
    outcomes: int
    variation: float
    band: float
    foreseen: int
    near: int

    @property
    def within(self) -> bool:
        return self.variation <= self.band and self.foreseen + self.near == self.draws


class Law:
    """The exact conditional distributions after a prompt, each by one full pass, made when first asked for."""

    def __init__(self, model: Model, ids: Sequence[int], sampling: Sampling = RESTRICTED) -> None:
        self.ids, self.sampling = tuple(ids), sampling
        self._logits = functools.cache(lambda said: logits_after(model, (*self.ids, *said)))
        self.after = functools.cache(self._after)

    def _after(self, said: tuple[int, ...]) -> Tensor:
        return distribution(self._logits(said), (*self.ids, *said), self.sampling)

    def joint(self, tokens: int) -> dict[tuple[int, ...], float]:
        """Of all texts of so many tokens."""
        law: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(tokens):
            law = {(*said, x): p * float(self.after(said)[x]) for said, p in law.items() for x in _support(self.after(said))}
        return law

    def foresee(self, seed: int, tokens: int) -> tuple[int, ...]:
        """The text that this seed says where no rounding stands in the way."""
        said: tuple[int, ...] = ()
        dice = Sampler(Sampling(self.sampling.temperature, seed=seed))
        for _ in range(tokens):
            said = (*said, draw(self.after(said), dice.number()))
        return said

    def edge(self, seed: int, at: int) -> float:
        """How far the number of token ``at`` is from the nearest edge between two tokens, where the seed's text comes to it."""
        said, dice = self.foresee(seed, at), Sampler(Sampling(self.sampling.temperature, seed=seed))
        number = [dice.number() for _ in range(at + 1)][-1]
        p_V = self.after(said)
        return float((p_V[p_V > 0].cumsum(0) - number).abs().min())

    def cut(self, said: tuple[int, ...]) -> float:
        """How far, in logits, the last token kept by the filter is from the first left out."""
        logits_V, kept = self._logits(said), self.sampling.top_k
        if kept is None or kept >= len(logits_V):
            return float("inf")
        top = logits_V.topk(kept + 1).values
        return float(top[-2] - top[-1])


def _support(p_V: Tensor) -> list[int]:
    return [int(x) for x in p_V.nonzero()[:, 0]]


def draws_of(
    law: Law,
    drafts: str,
    make: Callable[[Sampling, int], Session],
    run: Callable[[Session], list[Step]],
    seeds: Sequence[int],
    noise: float,
) -> Drawing:
    """Draw a text from each seed, and compare."""
    found, drafted, accepted, foreseen, near = Counter[tuple[int, ...]](), 0, 0, 0, 0
    for i, seed in enumerate(seeds):
        session = make(Sampling(**{**law.sampling.to_json(), "seed": seed}), i)
        said = tuple(step.token for step in run(session))
        found[said] += 1
        drafted += session.counters.drafted
        accepted += session.counters.accepted
        wanted = law.foresee(seed, TOKENS)
        if said == wanted:
            foreseen += 1
        else:
            at = next((t for t, (a, b) in enumerate(zip(said, wanted, strict=False)) if a != b), len(said))
            near += at < min(len(said), TOKENS) and _rounded(law, seed, at, wanted[:at], noise)
    exact = law.joint(TOKENS)
    parts = [(leading(found, n), leading(exact, n)) for n in range(1, TOKENS + 1)]
    bands = [(total_variation(f, p), variation_band(p, len(seeds), RISK / TOKENS)) for f, p in parts]
    worst = max(bands, key=lambda pair: pair[0] / pair[1])
    return Drawing(drafts, len(seeds), drafted, accepted, TOKENS, len(exact), *worst, foreseen, near)


def _rounded(law: Law, seed: int, at: int, said: tuple[int, ...], noise: float) -> bool:
    """Whether rounding explains that a number gave another token: an edge, or the filter's cut, is that near."""
    moved = EDGES * noise / law.sampling.temperature
    return law.edge(seed, at) <= moved or law.cut(said) <= EDGES * noise


def likely_draft(law: Law) -> Callable[[Sequence[int]], int]:
    """A truth for scripted drafts: the likeliest token after a text, so that it is often the one that is drawn."""
    start = len(law.ids)

    def truth(text: Sequence[int]) -> int:
        said = tuple(text[start:])
        return int(torch.argmax(law.after(said)))

    return truth
