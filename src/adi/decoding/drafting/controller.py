"""The controller of one sequence: who drafts next and how likely each draft is right, from what was accepted so far and what
its share of the next pass costs. ``drafting.rounds`` then decides for all sequences of that pass together.

With acceptances ``p_1, p_2, ...`` of the drafts in a row, k drafts are worth their time where ::

    1 + p_1 + p_1 p_2 + ... + p_1 ... p_k  [tokens]       1  [token]
    ------------------------------------------------  >  -----------
         pass(k + 1) + drafting(k)  [seconds]            pass(1) [s]

``pass(n)`` being a pass over n rows with its head, ``drafting(k)`` k steps of the drafter, 0 for n-grams (Leviathan et al.
2023, with costs measured by number of rows instead of assumed). The controller takes the k and the drafter with the largest
left side, and looks again now and then at a level that has not paid. In a pass that others share, ``pass`` is this sequence's
share of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from adi.decoding.drafting.cost_model import CostModel
from adi.drafters.ngram import NgramMatch

MOST_DRAFTS = 15
LONGEST_CHAIN = 6  # of drafter steps
EXPLORING = 0.015  # share of the time that may go into single drafts by levels that have not paid, to see whether they would;
# of sequences in one pass over the root of their number: what they find is much the same
PATIENCE = 48  # rounds after which such a draft is made even if it costs more
LOSS = 4.0  # passes that drafting may have cost more than it gave (of sequences in one pass over the root of their number), ...
FORGIVEN = 0.01  # ... of which so many are forgiven with every token: over 200 tokens at most 6 passes, 3%, can be lost
HOPELESS = 0.03  # a chance below which no more drafts are thought of
MARGIN = 1.03  # by which drafts must beat none where sequences share passes: of many that learn, one is often too hopeful
WEIGHT = 12.0  # of a prior, in drafts
MEMORY = 0.985  # what counts of an observation after the next one
RATIO_WEIGHT, RATIO_MEMORY = 6.0, 0.95

# How often the next token was what a memory says after a run of so many matched tokens, and, that one right, the next: of the
# text at hand on 300 answers of SmolLM2-135M to training prompts; of habits on four kinds of task that came again eight times
# with other details (email, code, extraction, travel), and on questions between them that had nothing to do with them.
# Where the memory voted, by tenth of the winner's share, on held-out talk.
MATCHED_FIRST: Mapping[str, Sequence[float]] = {
    "context": (0.0, 0.23, 0.55, 0.65, 0.71, 0.71, 0.74, 0.77, 0.91),
    "history": (0.0, 0.1, 0.27, 0.33, 0.48, 0.62, 0.64, 0.72, 0.77),
}
MATCHED_NEXT: Mapping[str, Sequence[float]] = {
    "context": (0.0, 0.66, 0.72, 0.75, 0.78, 0.81, 0.83, 0.84, 0.94),
    "history": (0.0, 0.15, 0.4, 0.5, 0.65, 0.67, 0.72, 0.78, 0.8),
}
VOTED_FIRST = (0.01, 0.13, 0.17, 0.23, 0.38, 0.43, 0.53, 0.72, 0.83, 0.87)
VOTED_NEXT = (0.07, 0.07, 0.14, 0.3, 0.41, 0.6, 0.65, 0.7, 0.84, 0.96)
GUESSED = 0.4


class DraftChoice(NamedTuple):
    """What to do in this round: ``level`` "memory", "drafter" or "full", and at most so many ``drafts``, of ``match`` if it is
    a memory's. How many of them are made and verified is decided with all sequences of the pass, unless the choice is
    ``settled``: an exploratory look, which has one, and what no controller chose."""

    level: str
    drafts: int = 0
    match: NgramMatch | None = None
    settled: bool = False

    @property
    def source(self) -> str:
        """Who drafts: a memory by name, or the drafter."""
        return self.match.source if self.match is not None else self.level


FULL = DraftChoice("full")


class PassShare(NamedTuple):
    """What the next pass costs each of the ``sequences`` that may draft for it, in seconds: ``passes`` by its own rows, as if
    all did alike; the ``first`` step of the drafter and a ``further`` one; and ``lone``, what a single further row costs."""

    passes: Sequence[float]
    first: float = 0.0
    further: float = 0.0
    lone: float = 0.0
    sequences: int = 1

    @classmethod
    def alone(cls, costs: CostModel) -> PassShare:
        """Of a sequence that has the pass to itself."""
        return cls.of(costs, 1, 1, costs.passes(MOST_DRAFTS + 1))

    @classmethod
    def of(cls, costs: CostModel, sequences: int, plain: int, passes: Sequence[float]) -> PassShare:
        """Of a pass of ``plain`` rows without drafts, one a token, for which so many sequences may draft; ``passes`` are its
        seconds by number of rows, as far as it may grow."""
        first = costs.drafting(1, sequences)
        further, top = costs.drafting(2, sequences) - first, len(passes) - 1
        lone = passes[min(plain + 1, top)] - passes[plain]
        if plain == 1:
            return cls(passes, first, further, lone)
        slope = (passes[top] - passes[top // 2]) / (top - top // 2)
        own = [0.0, base := passes[plain] / plain]
        for rows in range(plain + sequences, plain + MOST_DRAFTS * sequences + 1, sequences):
            seconds = passes[rows] if rows <= top else passes[top] + slope * (rows - top)
            own.append(base + (seconds - passes[plain]) / sequences)
        return cls(own, first / sequences, further / sequences, lone, sequences)

    @property
    def margin(self) -> float:
        """How many times more tokens a second drafts must promise than none."""
        return MARGIN if self.sequences > 1 else 1.0

    @property
    def most_lost(self) -> float:
        """Seconds that drafting may have cost one of them more than it gave."""
        return LOSS * self.passes[1] / math.sqrt(self.sequences)

    def drafting(self, steps: int) -> float:
        """Seconds of so many steps of the drafter in a row."""
        return self.first + (steps - 1) * self.further if steps else 0.0


NOTHING = PassShare(())


class DraftControl(Protocol):
    """Chooses the drafter of a round and tells how likely its drafts are right; ``Controller`` adapts."""

    costs: CostModel | None

    @property
    def looks(self) -> int:
        """The most drafts to look for."""
        return MOST_DRAFTS

    def choose(self, matches: Sequence[NgramMatch], drafter: bool, most: int, share: PassShare) -> DraftChoice:
        """For these n-gram matches and perhaps a drafter, in a round of at most so many drafts."""
        ...

    def chances(self, choice: DraftChoice, confidences: Sequence[float]) -> Sequence[float]:
        """Of each draft, to stand with all before it: the drafter's with these confidences, and those that may follow."""
        return ()

    def update(self, choice: DraftChoice, confidences: Sequence[float], drafts: int, accepted: int, seconds: float) -> None:
        """Full depth accepted so many of the drafts that it was shown; all drafting of the round took so long."""
        return


@dataclass(slots=True)
class DecayedRate:
    """How often something came true: a prior worth some observations, and observations that fade."""

    prior: float
    weight: float = WEIGHT
    fading: float = MEMORY
    seen: float = 0.0
    true: float = 0.0

    def add(self, came_true: float, of: float = 1.0) -> None:
        self.seen = self.fading * self.seen + of
        self.true = self.fading * self.true + came_true

    def given(self, prior: float) -> float:
        return (prior * self.weight + self.true) / (self.weight + self.seen)

    @property
    def value(self) -> float:
        return self.given(self.prior)


def _as_expected() -> DecayedRate:
    """Accepted over expected drafts of a level, lately: it falls and rises within a few drafts, whatever the bins say."""
    return DecayedRate(1.0, RATIO_WEIGHT, RATIO_MEMORY)


@dataclass
class Controller:
    """One sequence's decisions; it never touches the network. ``bins`` maps tenths of confidence (0 to 9) to acceptance;
    ``steps`` is how often the drafter's first, second, ... draft in a row is right, those before it being so, where that was
    measured."""

    costs: CostModel | None
    drafts: int = MOST_DRAFTS
    bins: Mapping[int, float] = field(default_factory=dict)
    steps: Sequence[float] = ()
    _shares: dict[tuple[str, int, bool], DecayedRate] = field(default_factory=dict)
    _steps: list[DecayedRate] = field(default_factory=lambda: [DecayedRate(GUESSED) for _ in range(MOST_DRAFTS)])
    _chain: list[float] = field(default_factory=list)  # of the drafter's drafts in a row, as far as is known in this round
    _ratio: dict[str, DecayedRate] = field(default_factory=lambda: defaultdict(_as_expected))
    _saved: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _share: PassShare = NOTHING
    _most: int = MOST_DRAFTS  # drafts in this round
    _lost: float = 0.0  # seconds

    @property
    def looks(self) -> int:
        """Fewer where sequences share passes, none while drafting does not pay for them."""
        return self.drafts if self.costs is None else min(self.drafts, self.costs.correction.trials.drafts)

    def choose(self, matches: Sequence[NgramMatch], drafter: bool, most: int, share: PassShare) -> DraftChoice:
        """For what memories offer, and perhaps a drafter, in a round of at most so many drafts."""
        self._share, self._most = share, (most := min(most, self.drafts))
        best, rate = FULL, (plain := share.margin / share.passes[1])
        offers = [DraftChoice("memory", min(len(match.tokens), most), match) for match in matches]
        if drafter:
            offers.append(DraftChoice("drafter", min(LONGEST_CHAIN, most)))
        for offer in offers:
            drafts, reachable = self._plan(offer)
            if not drafts:
                continue
            if reachable > rate:
                best, rate = DraftChoice(offer.level, most if offer.match is None else drafts, offer.match), reachable
            elif reachable <= plain and best.level == "full" and self._may_explore(offer.source):
                best = DraftChoice(offer.level, 1, offer.match, settled=True)
        return best

    def _price(self, source: str, drafts: int) -> float:
        """Seconds that this many drafts cost if none of them is right."""
        share = self._share
        steps = drafts if source == "drafter" else 0
        return share.passes[drafts + 1] - share.passes[1] + share.drafting(steps)

    def _affords(self, source: str, drafts: int) -> bool:
        return self._lost + self._price(source, drafts) <= self._share.most_lost

    def _spend(self, seconds: float, tokens: int) -> None:
        """A round gave ``tokens`` and took ``seconds`` longer than without drafts."""
        plain = self._share.passes[1]
        self._lost = max(0.0, self._lost + seconds - (tokens - 1) * plain - FORGIVEN * plain * tokens)

    def _look(self, source: str) -> float:
        """Seconds that one draft costs where nobody else drafts."""
        return self._share.lone + self._share.drafting(source == "drafter")

    def _may_explore(self, source: str) -> bool:
        """Whether enough was saved up for one draft that may well be wrong."""
        price = self._look(source)
        beside = self._share.sequences
        self._saved[source] += max(EXPLORING * self._share.passes[1] / math.sqrt(beside), price / PATIENCE / beside)
        return self._saved[source] >= price

    def _plan(self, offer: DraftChoice) -> tuple[int, float]:
        """The number of drafts that gives most, and the tokens per second that it gives."""
        best, most, tokens, reach = 0, 0.0, 1.0, 1.0
        share = self._share
        limit = share.passes[1] + share.most_lost - self._lost
        for drafts, chance in enumerate(self._acceptances(offer), 1):
            seconds = share.passes[drafts + 1]
            if offer.match is None:
                seconds += share.drafting(drafts)
            reach *= chance
            if seconds > limit or (reach < HOPELESS and drafts > 1):
                break
            tokens += reach
            if tokens > most * seconds:
                best, most = drafts, tokens / seconds
            elif tokens + reach * (offer.drafts - drafts) <= most * seconds:
                break  # were all the others right, they would not be worth their rows
        return best, most

    def _acceptances(self, offer: DraftChoice) -> Iterable[float]:
        """Of one draft after the other, those before it given; for all drafts of the offer."""
        match, drafts = offer.match, offer.drafts
        if match is None:
            self._expected_chain(max(drafts, self._most))
            return self._chain[:drafts]
        ratio = self._ratio[match.source].value
        if match.shares:
            runs = (self._run(match, draft).value for draft in range(1, min(drafts, len(match.shares)) + 1))
            return (min(0.98, share * ratio) for share in runs)
        first, later = (min(0.98, self._run(match, draft).value * ratio) for draft in (1, 2))
        return [first, *[later] * (drafts - 1)][:drafts]

    def _run(self, match: NgramMatch, draft: int) -> DecayedRate:
        if match.shares:
            priors: Sequence[float] = VOTED_FIRST if draft == 1 else VOTED_NEXT
            place = bin_of(match.shares[draft - 1])
        else:
            known = MATCHED_FIRST if draft == 1 else MATCHED_NEXT
            priors = known.get(match.source, known["history"])
            place = min(match.matched, len(priors) - 1)
        key = (match.source, place, draft == 1)
        if (share := self._shares.get(key)) is None:
            share = self._shares[key] = DecayedRate(priors[place])
        return share

    def _expected_chain(self, most: int) -> None:
        """Before the drafter has spoken: how often its first, second, ... draft in a row was accepted, those before it given.

        A place that was hardly reached is taken for as good as the one before it. It holds for the round.
        """
        share, ratio, chain = GUESSED, self._ratio["drafter"].value, self._chain
        chain.clear()
        for place, known in enumerate(self._steps[:most]):
            share = known.given(self.steps[place] if place < len(self.steps) else share)
            chain.append(min(0.98, share * ratio))

    def _bin(self, confidence: float) -> DecayedRate:
        key = ("drafter", bin_of(confidence), False)
        if key not in self._shares:
            self._shares[key] = DecayedRate(self.bins.get(key[1], (key[1] + 0.5) / 10))
        return self._shares[key]

    def chances(self, choice: DraftChoice, confidences: Sequence[float]) -> Sequence[float]:
        """Of each draft, to stand with all before it: the drafter's with these confidences, and those that may follow, as far
        as the budget of losses allows."""
        made, source = len(confidences), choice.source
        if choice.match is not None:
            shares = list(self._acceptances(choice))
        else:
            ratio, end = self._ratio[source].value, min(max(LONGEST_CHAIN, made + 1), choice.drafts)
            shares = [min(0.98, self._bin(confidence).value * ratio) for confidence in confidences] + self._chain[made:end]
        found, reach = list[float](), 1.0
        for drafts, share in enumerate(shares, 1):
            reach *= share
            if (reach < HOPELESS and drafts > 1) or (drafts > made and not self._affords(source, drafts)):
                break
            found.append(reach)
        return found

    def update(self, choice: DraftChoice, confidences: Sequence[float], drafts: int, accepted: int, seconds: float) -> None:
        """Full depth has spoken: ``accepted`` of ``drafts`` stand. What lies behind the first wrong one says nothing."""
        source = choice.source
        self._spend(seconds, accepted + 1)
        if choice.level == "full":
            return
        self._saved[source] = self._look(source) if accepted == drafts > 0 else 0.0  # it was right to look: look again at once
        for draft in range(1, min(accepted + 1, drafts) + 1):
            right = float(draft <= accepted)
            if choice.match is not None:
                share = self._run(choice.match, draft)
            else:
                share = self._bin(confidences[draft - 1])
                self._steps[draft - 1].add(right)
            self._ratio[source].add(right, share.value)
            share.add(right)


def bin_of(confidence: float) -> int:
    """Tenths, 0 to 9."""
    return min(9, max(0, int(confidence * 10)))
