"""Drafting for one pass, of all sequences that will share it: how far each drafts, and which drafts the pass verifies.

A pass of R rows without drafts gives R tokens. Of all drafts that sequences offer, those come first that are likeliest to stand
(with all before them in their sequence, chances ``r_1 >= r_2 >= ...``), and m of them are worth their time where ::

    R + r_1 + ... + r_m  [tokens]        R  [tokens]
    ----------------------------  >  -------------
     pass(R + m) + drafting  [s]       pass(R) [s]

The m with the largest left side is taken. So a further row costs what it costs in this pass: next to nothing while rows are
few, and drafting thins out and ends as sequences become more. How sure the drafter is shows only once it has drafted: then the
same sum decides again, at the rate found before, which drafts are verified and who drafts on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import itemgetter
from time import perf_counter
from typing import TYPE_CHECKING, Any

from adi.decoding.drafting.controller import FULL, MOST_DRAFTS, NOTHING, DraftChoice, DraftControl, PassShare
from adi.drafters.ngram import NgramMatch
from adi.errors import NoDistributionError
from adi.model.arrays import joined
from adi.model.backbone import MERGED_ROWS

if TYPE_CHECKING:
    from adi.drafters.network import Drafting


@dataclass(eq=False, slots=True)
class DraftRound:
    """One sequence's drafts for its next pass, asked for: at most ``most`` after the token ``last`` at ``position``, of
    ``matches`` or, with ``drafter``, of the drafter. Answered by ``tokens``, with ``confidences`` where the drafter made them.

    ``drafting`` is the drafter at work, ``start`` gives the state that it begins with and ``state`` where it goes on from.
    ``tells``: the pass's seconds teach the costs.
    ``error`` is for the sequence to raise: the others go on.
    """

    control: DraftControl
    matches: Sequence[NgramMatch]
    drafter: bool
    most: int
    last: int
    position: int
    ends: Callable[[int], bool]
    choice: DraftChoice = FULL
    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    wanted: int = 0  # drafts that the pass should have
    seconds: float = 0.0  # that they cost
    drafting: Drafting | None = None
    start: Callable[[], Any] | None = None
    state: Any = None
    tells: bool = False
    error: NoDistributionError | None = None

    @property
    def ended(self) -> bool:
        """Nothing follows a token that ends the text."""
        return bool(self.tokens) and self.ends(self.tokens[-1])

    @property
    def drafts(self) -> Iterator[tuple[int, float | None]]:
        """Each with the drafter's confidence, None of a memory's."""
        return zip_longest(self.tokens, self.confidences[: len(self.tokens)])

    @property
    def drafts_on(self) -> bool:
        """Whether the drafter is to make one more."""
        return self.choice.level == "drafter" and len(self.tokens) < self.wanted and not (self.ended or self.error)

    def begin(self, choice: DraftChoice) -> None:
        """Take the memory's drafts, up to one that ends the text, and as many as were settled."""
        self.choice = choice
        for token in self.choice.match.tokens[: self.choice.drafts] if self.choice.match is not None else ():
            if not self.ended:
                self.draft(token)
        if self.choice.settled:
            self.wanted = self.choice.drafts if self.choice.match is None else len(self.tokens)

    def draft(self, token: int, confidence: float | None = None) -> None:
        """One more draft."""
        self.tokens.append(token)
        if confidence is not None:
            self.confidences.append(confidence)


def draft_together(rounds: Sequence[DraftRound], beside: int = 0, most_rows: int = MERGED_ROWS) -> None:
    """Answer all ``rounds``, whose sequences share their next pass with ``beside`` rows of others, ``most_rows`` in all."""
    plan = _Plan(rounds, beside, most_rows)
    plan.allot()
    while drafting := [one for one in rounds if one.drafts_on]:
        _step(drafting)
        plan.allot()
    plan.settle()


def _step(rounds: Sequence[DraftRound]) -> None:
    """One more draft by the drafter for each of them, of those with the same drafter in one call."""
    drafting = rounds[0].drafting
    assert drafting is not None
    mine = [one for one in rounds if one.drafting is drafting]
    started, first = perf_counter(), not mine[0].tokens
    for one in mine:
        if one.state is None and one.start is not None:
            one.state = one.start()
    last = [one.tokens[-1] if one.tokens else one.last for one in mine]
    guesses, states = drafting.step(last, mine[0].state if len(mine) == 1 else joined([one.state for one in mine]))
    for i, (one, guess) in enumerate(zip(mine, guesses, strict=True)):
        one.state = states[i : i + 1]
        if math.isfinite(sure := guess.signals["top_probability"]):
            one.draft(guess.token, sure)
        else:
            one.error = NoDistributionError(f"the drafter holds no distribution: its largest probability is {sure}.")
    if (costs := mine[0].control.costs) is not None:
        costs.drafted(perf_counter() - started, first, len(mine))
    if others := [one for one in rounds if one.drafting is not drafting]:
        _step(others)


class _Plan:
    """Which drafts are worth their rows in the next pass."""

    def __init__(self, rounds: Sequence[DraftRound], beside: int, most_rows: int) -> None:
        self.rounds, self.plain, self.rate = rounds, len(rounds) + beside, 0.0
        asked, unsure = [one for one in rounds if one.control.costs is not None], False
        self.passes: Sequence[float] = ()
        self.share = NOTHING
        if asked and (costs := asked[0].control.costs) is not None:
            costs.at_position(sum(one.position for one in asked) // len(asked))
            self.most_rows = min(most_rows, self.plain + sum(min(one.most, MOST_DRAFTS) for one in rounds))
            others = sum(min(one.most, MOST_DRAFTS) for one in rounds if one not in asked)  # who draft whatever it costs
            self.passes = costs.passes(max(self.most_rows, self.plain) + others)
            self.share = PassShare.of(costs, len(asked), self.plain, self.passes)
            asked[0].tells = True
            unsure = costs.correction.unsure(self.plain)
        self.rows = self.plain
        for one in rounds:
            choice = one.control.choose(one.matches, one.drafter, one.most, self.share)
            priced = one.control.costs is not None
            full = priced and (unsure or (choice.settled and self.rows + choice.drafts > self.most_rows))
            one.begin(FULL if full else choice)
            self.rows += one.wanted
        self.open = [one for one in rounds if not one.choice.settled and one.choice is not FULL]

    def allot(self) -> None:
        """Set how many drafts of each are wanted: those that give most tokens a second or, once a rate was found, most beyond
        what their seconds would give at that rate."""
        if not self.open:
            return
        offers = [offer for one in self.open for offer in self._offers(one)]
        offers.sort(key=itemgetter(0), reverse=True)  # stable: a sequence's drafts stay in their order
        tokens, drafting, best, rate = float(self.plain), 0.0, 0, self.rate
        seconds = self.passes[self.rows]
        most = tokens - rate * seconds if rate else self.share.margin * tokens / seconds
        for drafts, (chance, step, _) in enumerate(offers[: max(0, self.most_rows - self.rows)], 1):
            tokens, drafting = tokens + chance, drafting + step
            seconds = self.passes[self.rows + drafts] + drafting
            worth = tokens - rate * seconds if rate else tokens / seconds
            if worth > most:
                best, most = drafts, worth
        for one in self.open:
            one.wanted = 0
        for _, _, one in offers[:best]:
            one.wanted += 1
        self.rate = rate or most

    def _offers(self, one: DraftRound) -> Iterator[tuple[float, float, DraftRound]]:
        """Each draft's chance to stand, the seconds that making it takes, and whose it is."""
        made = len(one.tokens)
        chances = one.control.chances(one.choice, one.confidences)
        for place, chance in enumerate(chances[:made] if one.choice.match is not None or one.ended else chances):
            step = 0.0 if place < made else self.share.further if place else self.share.first
            yield chance, step, one

    def settle(self) -> None:
        """What is not wanted is not verified; and what drafting cost each."""
        wanted = sum(one.wanted for one in self.rounds)
        row = (self.passes[self.plain + wanted] - self.passes[self.plain]) / wanted if wanted and self.passes else 0.0
        for one in self.rounds:
            one.seconds = row * one.wanted + self.share.drafting(len(one.confidences))
            del one.tokens[one.wanted :]
