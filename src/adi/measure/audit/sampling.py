"""The sampling test: draws of a few tokens over a restricted vocabulary, against their exact law from full-depth logits."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from adi.decoding.records import Step
from adi.decoding.sampler import Sampler, distribution, draw
from adi.decoding.sampling import Sampling
from adi.decoding.session import Session
from adi.measure.audit.match import logits_after
from adi.measure.statistics import common_prefix, leading, total_variation, variation_band
from adi.model.load import Model

TOKENS = 3
RESTRICTED = Sampling(temperature=1.3, top_k=4)
RISK = 1e-6
EDGES = 2.0  # noises of a logit by which an edge between two tokens may have moved
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Draws:
    """What the draws of one way of drafting showed. ``variation`` from the exact law is compared with its ``band``, at the
    number of first tokens at which it is worst. ``foreseen``: draws that are token for token those of their seed by the exact
    law; ``near``: those that are not, with the number so near an edge between two tokens that rounding explains it."""

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

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "within": self.within}

    def violations(self, where: str) -> list[str]:
        """Where law or seeds do not hold, in sentences."""
        found, what = [], f"draws with drafts by {self.drafts!r} are"
        if self.variation > self.band:
            found.append(f"{where}: {what} {self.variation:.3f} off their law, {self.band:.3f} is allowed")
        if (odd := self.draws - self.foreseen - self.near) > 0:
            found.append(f"{where}: {odd} of {self.draws} {what} not those of their seeds")
        return found


class Law:
    """The exact conditional distributions after a prompt, each by one full pass, made when first asked for."""

    def __init__(self, model: Model, ids: Sequence[int], sampling: Sampling = RESTRICTED) -> None:
        self.ids, self.sampling = tuple(ids), sampling
        self._logits = functools.cache(lambda text: logits_after(model, (*self.ids, *text)))
        self.after = functools.cache(self._after)

    def _after(self, text: Ids) -> Tensor:
        return distribution(self._logits(text), self.sampling)

    def joint(self, tokens: int) -> dict[Ids, float]:
        """Of all texts of so many tokens."""
        law: dict[Ids, float] = {(): 1.0}
        for _ in range(tokens):
            law = {
                (*text, x): p * float(self.after(text)[x])
                for text, p in law.items()
                for x in self.after(text).nonzero()[:, 0].tolist()
            }
        return law

    def foresee(self, seed: int, tokens: int) -> Ids:
        """The text of this seed where no rounding is in the way."""
        text: Ids = ()
        for number in self._numbers(seed, tokens):
            text = (*text, draw(self.after(text), number))
        return text

    def rounded(self, seed: int, at: int, noise: float) -> bool:
        """Whether rounding explains that the number of token ``at`` gave another token: an edge between two tokens, or the
        filter's cut, is that near."""
        text, number = self.foresee(seed, at), self._numbers(seed, at + 1)[-1]
        p_V = self.after(text)
        edge = float((p_V[p_V > 0].cumsum(0) - number).abs().min())
        return edge <= EDGES * noise / self.sampling.temperature or self._cut(text) <= EDGES * noise

    def _numbers(self, seed: int, count: int) -> list[float]:
        dice = Sampler(Sampling(self.sampling.temperature, seed=seed))
        return [dice.number() for _ in range(count)]

    def _cut(self, text: Ids) -> float:
        """How far, in logits, the last token kept by the filter is from the first left out."""
        logits_V, kept = self._logits(text), self.sampling.top_k
        if kept is None or kept >= len(logits_V):
            return float("inf")
        top = logits_V.topk(kept + 1).values
        return float(top[-2] - top[-1])


def draws_of(
    law: Law,
    drafts: str,
    make: Callable[[Sampling, int], Session],
    run: Callable[[Session], list[Step]],
    seeds: Sequence[int],
    noise: float,
) -> Draws:
    """Draw a text from each seed, and compare."""
    found, drafted, accepted, foreseen, near = Counter[Ids](), 0, 0, 0, 0
    for i, seed in enumerate(seeds):
        session = make(Sampling(**{**law.sampling.to_json(), "seed": seed}), i)
        text = tuple(step.token for step in run(session))
        found[text] += 1
        drafted += session.counters.drafted
        accepted += session.counters.accepted
        wanted = law.foresee(seed, TOKENS)
        at = common_prefix(text, wanted)
        foreseen += text == wanted
        near += at < min(len(text), TOKENS) and law.rounded(seed, at, noise)
    exact = law.joint(TOKENS)
    parts = [(leading(found, n), leading(exact, n)) for n in range(1, TOKENS + 1)]
    bands = [(total_variation(f, p), variation_band(p, len(seeds), RISK / TOKENS)) for f, p in parts]
    worst = max(bands, key=lambda pair: pair[0] / pair[1])
    return Draws(drafts, len(seeds), drafted, accepted, TOKENS, len(exact), *worst, foreseen, near)


def likely_draft(law: Law) -> Callable[[Sequence[int]], int]:
    """Gives the likeliest token after a text: a draft that is often the token drawn."""
    return lambda text: int(law.after(tuple(text[len(law.ids) :])).argmax())
