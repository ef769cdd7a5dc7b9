"""Joint laws of sampled tokens, known by enumeration, and the real logic driven to draw from them.

The network is a table whose conditional distributions depend on the whole text; the logic, the rule and the maths are the real
ones. The band is ``measure.statistics.variation_band``: a total variation above it has a chance of one in a million where the
law is right.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from adi.decoding.drafting.controller import Controller
from adi.decoding.drafting.cost_model import CostModel
from adi.decoding.drafting.proposers import ControlledProposer, ExitProposer, FixedLength, NgramSources, NoDrafts
from adi.decoding.drafting.rounds import DraftRound, draft_together
from adi.decoding.processors import processed
from adi.decoding.requests import DraftToken, Emitted, Forward, Request, SequenceLogic
from adi.decoding.sampler import Sampler, distribution
from adi.decoding.sampling import Sampling
from adi.decoding.speculate import Proposal, Proposing, Strategy, speculate
from adi.drafters.ngram import NgramIndex
from adi.exits.triggers import Always, Threshold, Trigger
from adi.measure.statistics import leading, total_variation, variation_band

V, TOKENS, LAYERS, DRAWS, RISK = 5, 4, 6, 20_000, 1e-6
PROMPT = (1, 2, 1)
SETTINGS = {
    "greedy-ish": Sampling(temperature=0.25, seed=0),
    "hot": Sampling(temperature=1.6, seed=0),
    "truncated": Sampling(temperature=1.1, top_k=3, top_p=0.9, min_p=0.05, repetition_penalty=1.3, seed=0),
}
Law = dict[tuple[int, ...], float]


@functools.cache
def full_logits(text: tuple[int, ...]) -> torch.Tensor:
    """What the table says after a text: other logits after every other text."""
    return 1.5 * torch.randn(V, generator=torch.Generator().manual_seed(hash(text) % 2**31))


@functools.cache
def early_logits(depth: int, text: tuple[int, ...]) -> torch.Tensor:
    """An exit's: full depth's, blurred the more the shallower."""
    noise = torch.randn(V, generator=torch.Generator().manual_seed(hash((depth, text)) % 2**31))
    return full_logits(text) + (LAYERS - depth) / 3 * noise


def processors(sampling: Sampling) -> list[Any]:
    """transformers' own, for what these settings change of the logits."""
    penalty = sampling.repetition_penalty
    return [] if penalty is None else [RepetitionPenaltyLogitsProcessor(penalty)]


def law_after(logits_V: torch.Tensor, text: Sequence[int], sampling: Sampling) -> torch.Tensor:
    """What is drawn from after a text."""
    return distribution(processed(processors(sampling), text, logits_V), sampling)


@functools.cache
def exact(sampling: Sampling) -> Law:
    """The joint law of ``TOKENS`` tokens after the prompt."""
    law: Law = {(): 1.0}
    for _ in range(TOKENS):
        longer: Law = {}
        for said, chance in law.items():
            p_V = law_after(full_logits(PROMPT + said), PROMPT + said, sampling).tolist()
            longer.update({(*said, x): chance * p for x, p in enumerate(p_V) if p > 0})
        law = longer
    return law


class Remembering(Sampler):
    """The rule, whose distributions are made once for each text, since the table always says the same after it."""

    def __init__(self, sampling: Sampling, made: dict[tuple[int, ...], torch.Tensor] | None = None) -> None:
        super().__init__(sampling, processors(sampling), V)
        self.made = made if made is not None else {}
        self.changed: dict[tuple[int, ...], torch.Tensor] = {}
        self.numbers = iter(())

    def number(self) -> float:
        """From the same dice, many at once, which is quicker."""
        if (found := next(self.numbers, None)) is None:
            self.numbers = iter(torch.rand(10_000, dtype=torch.float64, generator=self._rng).tolist())
            found = next(self.numbers)
        return found

    def distribution(self, scores_S: torch.Tensor, text: Sequence[int]) -> torch.Tensor:
        key = tuple(text)
        if key not in self.made:
            self.made[key] = super().distribution(scores_S, text)
        return self.made[key]

    def _processed(self, text: Sequence[int], scores_S: torch.Tensor, ids_S: Any) -> torch.Tensor:
        key = tuple(text)
        if key not in self.changed:
            self.changed[key] = super()._processed(text, scores_S, ids_S)
        return self.changed[key]


@dataclass
class Row:
    """A reading of the table at one depth."""

    depth: int
    text: tuple[int, ...]

    @property
    def scores(self) -> tuple[torch.Tensor, None]:
        return (full_logits(self.text) if self.depth == LAYERS else early_logits(self.depth, self.text)), None

    @property
    def token(self) -> int:
        return _likeliest(self.depth, self.text)[0]

    @property
    def signals(self) -> Mapping[str, float]:
        return {"top_probability": _likeliest(self.depth, self.text)[1]}


@functools.cache
def _likeliest(depth: int, text: tuple[int, ...]) -> tuple[int, float]:
    p_V = early_logits(depth, text).softmax(-1)
    return int(p_V.argmax()), float(p_V.max())


@dataclass
class Table:
    """In a drafter's place: what depth 2 says after a text."""

    text: tuple[int, ...]

    def step(self, tokens: Sequence[int], state: None) -> tuple[list[Row], list[None]]:
        self.text += tuple(tokens)
        return [Row(2, self.text)], [None]


def run(sequence: SequenceLogic, slip: int = 0) -> tuple[list[Emitted], int]:
    """Drive a logic against the table: what it says, and how many drafts it made. ``slip`` rolls back that much too little."""
    ids: list[int] = []
    said, drafted, reply = list[Emitted](), 0, None
    while True:
        try:
            item = next(sequence) if reply is None else sequence.send(reply)
        except StopIteration:
            return said, drafted
        reply = None
        if isinstance(item, Forward):
            ids[min(item.keep + slip, len(ids)) if item.keep < len(ids) else item.keep :] = item.ids
            reply = [Row(item.to, tuple(ids[: row + 1])) for row in range(len(ids) - item.read, len(ids))]
        elif isinstance(item, DraftRound):
            item.drafting = Table(tuple(ids[: item.position - 1]))  # type: ignore[assignment]
            draft_together([item])
        elif isinstance(item, DraftToken):
            drafted += 1
        else:
            said.append(item)


def request(rule: Any) -> Request:
    return Request(PROMPT, TOKENS, LAYERS, lambda _: False, rule)


def by_exits(wanted: Request, trigger: Trigger) -> ExitProposer:
    return ExitProposer(wanted, (2, 4), trigger)


def verified(rule: Any, trigger: Trigger) -> SequenceLogic:
    wanted = request(rule)
    return speculate(wanted, Strategy(by_exits(wanted, trigger), 3))


def cheap() -> CostModel:
    """Costs at which drafts are always worth their while."""
    return CostModel({1: 1.0, 16: 1.01}, 0.001)


class Memory:
    """A history that knows what often follows, and is often wrong."""

    def find(self, text: Sequence[int], most: int) -> Any:
        from adi.drafters.ngram import NgramMatch

        return NgramMatch(tuple(_likeliest(4, (*text, i))[0] for i in range(min(3, most))), 3, "history") if most else None


def adaptive(rule: Any, drafter: bool) -> SequenceLogic:
    wanted, sources = request(rule), NgramSources(() if drafter else (Memory(),), None if drafter else NgramIndex())
    return speculate(wanted, Strategy(ControlledProposer(wanted, Controller(cheap()), sources, drafter), 15))


def lookup(rule: Any) -> SequenceLogic:
    wanted, sources = request(rule), NgramSources((), NgramIndex(2))
    return speculate(wanted, Strategy(ControlledProposer(wanted, FixedLength(), sources, False), 3))


KINDS: dict[str, Callable[[Any], SequenceLogic]] = {
    "memory": lambda rule: adaptive(rule, False),
    "drafter": lambda rule: adaptive(rule, True),
    "exit head": lambda rule: verified(rule, Threshold("top_probability", 0.45)),
    "exit head, always": lambda rule: verified(rule, Always((2,))),
    "lookup": lookup,
    "full depth": lambda rule: speculate(request(rule), Strategy(NoDrafts(), 0)),
}


def sampled(
    make: Callable[[Any], SequenceLogic], rule: Sampler, draws: int = DRAWS, slip: int = 0
) -> tuple[Counter[tuple[int, ...]], int, int]:
    """Counts of the texts said, drafts made and drafts accepted; one rule, so one stream of numbers, through all draws."""
    found, drafted, accepted = Counter[tuple[int, ...]](), 0, 0
    for _ in range(draws):
        said, made = run(make(rule), slip)
        found[tuple(d.token for d in said)] += 1
        drafted += made
        accepted += sum(d.draft is not None for d in said)
    return found, drafted, accepted


def off(found: Counter[tuple[int, ...]], law: Law) -> float:
    """Total variation from a law over its band, at its worst over the first token, two, ...: above 1 it is no chance."""
    parts = [(leading(found, n), leading(law, n)) for n in range(1, TOKENS + 1)]
    return max(total_variation(f, p) / variation_band(p, found.total(), RISK / TOKENS) for f, p in parts)


DRAFTERS = ("memory", "drafter", "exit head")


class Drawn:
    """A drafter that draws from an exit's density, with dice of its own, and says what it drew from.

    ``stated`` is another density to state instead; ``dislikes`` makes it look at what it drew, and keep back what it dislikes.
    """

    def __init__(
        self, stated: Callable[[torch.Tensor], torch.Tensor] = lambda q: q, dislikes: frozenset[int] = frozenset()
    ) -> None:
        self.dice, self.stated, self.dislikes = random.Random(1), stated, dislikes

    def __call__(self, rule: Any) -> SequenceLogic:
        return speculate(request(rule), Strategy(self, 2))

    def propose(self, text: Sequence[int], most: int) -> Proposing:
        drafts: list[DraftToken] = []
        while len(drafts) < most:
            known = (*text, *(d.token for d in drafts))
            q_V = density(known)
            token = self.dice.choices(range(V), q_V.tolist())[0]
            if token in self.dislikes:
                break
            drafts.append(DraftToken(token, 2, density_V=self.stated(q_V)))
        return Proposal(len(text) - 1, drafts)
        yield  # a generator all the same

    def on_verified(self, accepted: int) -> None: ...


@functools.cache
def density(text: tuple[int, ...]) -> torch.Tensor:
    return early_logits(3, text).double().softmax(-1)
