"""Who drafts: exits of the network itself, n-gram matches, the drafter."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from adi.decoding.drafting.controller import FULL, DraftChoice, DraftControl, PassShare
from adi.decoding.drafting.rounds import DraftRound
from adi.decoding.requests import DraftToken, ExitCheck, Forward, Replies, Request, Yields
from adi.decoding.speculate import Proposal, Proposer, Proposing
from adi.drafters.ngram import NgramIndex, NgramMatch
from adi.exits.triggers import Trigger


@dataclass(frozen=True)
class NoDrafts(Proposer):
    """Ordinary decoding: one token a pass."""

    def propose(self, text: Sequence[int], most: int) -> Proposing:
        """Nothing."""
        return Proposal(len(text) - 1)
        yield  # a generator all the same


@dataclass(frozen=True)
class ExitProposer(Proposer):
    """Drafts from exits: each token is run from stop to stop until ``trigger`` fires; where it fires nowhere, drafting ends."""

    request: Request
    stops: tuple[int, ...]
    trigger: Trigger

    def propose(self, text: Sequence[int], most: int) -> Proposing:
        """Nothing is computed twice: what has run stays in the frontier, and verifying goes on from there."""
        drafts: list[DraftToken] = []
        known, token = len(text) - 1, text[-1]
        while len(drafts) < most and not (drafts and self.request.ends(token)):
            checks = yield from self._climb(known, token)
            known += bool(checks)
            if not (checks and checks[-1].fired):
                return Proposal(known, drafts, checks)
            token = checks[-1].output.token
            drafts.append(DraftToken(token, checks[-1].output.depth, checks))
        return Proposal(known, drafts)

    def _climb(self, keep: int, token: int) -> Generator[Yields, Replies, tuple[ExitCheck, ...]]:
        """Append ``token`` and go up until the trigger fires."""
        checks: list[ExitCheck] = []
        ids: tuple[int, ...] = (token,)
        for stop in self.stops:
            (output,) = yield Forward(keep, ids, stop)
            keep, ids = keep + len(ids), ()
            checks.append(ExitCheck(output, self.trigger.fires(output.signals, stop)))
            if checks[-1].fired:
                break
        return tuple(checks)


class NgramSource(Protocol):
    """Where n-grams are looked up; ``drafters.history.History`` is one."""

    def find(self, text: Sequence[int], most: int) -> NgramMatch | None: ...


@dataclass
class NgramSources:
    """The text at hand (``text``, None: not), and ``others`` beside it."""

    others: Sequence[NgramSource] = ()
    text: NgramIndex | None = field(default_factory=NgramIndex)

    def find(self, text: Sequence[int], most: int) -> list[NgramMatch]:
        """What followed the last tokens, by every source that knows them."""
        own: tuple[NgramSource, ...] = () if self.text is None else (self.text,)
        found = (source.find(text, most) for source in (*own, *self.others))
        return [match for match in found if match is not None]


@dataclass(frozen=True)
class FixedLength(DraftControl):
    """No control: in every round as many drafts as allowed, of the drafter where there is one, else of the first match."""

    costs: None = None

    def choose(self, matches: Sequence[NgramMatch], drafter: bool, most: int, share: PassShare) -> DraftChoice:
        """Whoever can draft, as far as possible."""
        if drafter and most:
            return DraftChoice("drafter", most, settled=True)
        return DraftChoice("memory", min(len(matches[0].tokens), most), matches[0], True) if matches else FULL


@dataclass
class ControlledProposer:
    """Drafts before any block runs, from n-gram matches or the drafter, as ``control`` decides in every round."""

    request: Request
    control: DraftControl
    sources: NgramSources
    drafter: bool
    _round: DraftRound | None = None

    def propose(self, text: Sequence[int], most: int) -> Proposing:
        """By one drafter a round; where none are to be looked for this is ordinary decoding, and costs what that costs."""
        if not (most := min(most, self.control.looks)):
            self._round = None
            return Proposal(len(text) - 1)
        matches = self.sources.find(text, most)
        self._round = made = DraftRound(self.control, matches, self.drafter, most, text[-1], len(text), self.request.ends)
        yield made
        return Proposal(len(text) - 1, [DraftToken(t, 0, level=made.choice.level, confidence=c) for t, c in made.drafts])

    def on_verified(self, accepted: int) -> None:
        """Tell the controller."""
        if (made := self._round) is not None:
            self.control.update(made.choice, made.confidences, len(made.tokens), accepted, made.seconds)
