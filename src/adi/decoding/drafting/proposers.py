"""Who drafts: exits of the network itself, n-gram matches, the drafter."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from adi.decoding.drafting.controller import FULL, DraftChoice
from adi.decoding.requests import DraftStep, DraftToken, ExitCheck, Forward, Replies, Request, Yields
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


class DraftControl(Protocol):
    """Chooses the drafter of a round and how far it drafts; ``decoding.drafting.controller.Controller`` adapts."""

    def at_position(self, length: int) -> None:
        """The next round begins after so many positions."""
        return

    def choose(self, matches: Sequence[NgramMatch], drafter: bool, most: int) -> DraftChoice:
        """For these n-gram matches and perhaps a drafter, in a round of at most so many drafts."""
        ...

    def should_continue(self, confidences: Sequence[float]) -> bool:
        """Whether the drafter drafts once more, after drafts of these confidences."""
        return True

    def update(self, choice: DraftChoice, confidences: Sequence[float], drafts: int, accepted: int) -> None:
        """Full depth accepted so many of these drafts."""
        return


@dataclass(frozen=True)
class FixedLength(DraftControl):
    """No control: in every round as many drafts as allowed, of the drafter where there is one, else of the first match."""

    def choose(self, matches: Sequence[NgramMatch], drafter: bool, most: int) -> DraftChoice:
        """Whoever can draft, as far as possible."""
        if drafter and most:
            return DraftChoice("drafter", most)
        return DraftChoice("memory", min(len(matches[0].tokens), most), matches[0]) if matches else FULL


@dataclass
class ControlledProposer:
    """Drafts before any block runs, from n-gram matches or the drafter, as ``control`` decides in every round."""

    request: Request
    control: DraftControl
    sources: NgramSources
    drafter: bool
    _choice: DraftChoice = FULL
    _drafts: list[DraftToken] = field(default_factory=list)

    def propose(self, text: Sequence[int], most: int) -> Proposing:
        """By one drafter a round."""
        self.control.at_position(len(text))
        self._choice = choice = self.control.choose(self.sources.find(text, most), self.drafter, most)
        self._drafts = drafts = []
        if choice.match is not None:
            drafts += [DraftToken(token, 0, level="memory") for token in self._to_the_end(choice.match.tokens[: choice.drafts])]
        elif choice.level == "drafter":
            yield from self._draft(text, choice.drafts)
        return Proposal(len(text) - 1, drafts)

    def on_verified(self, accepted: int) -> None:
        """Tell the controller."""
        if drafts := self._drafts:
            self.control.update(self._choice, _confidences(drafts), len(drafts), accepted)

    def _draft(self, text: Sequence[int], most: int) -> Generator[Yields, Replies, None]:
        """One step of the drafter after the other, while the controller finds it worth its time."""
        drafts, last = self._drafts, text[-1]
        while True:
            (output,) = yield DraftStep(last, len(text) - 1, fresh=not drafts)
            last = output.token
            drafts.append(DraftToken(last, 0, level="drafter", confidence=output.signals["top_probability"]))
            if self.request.ends(last) or len(drafts) >= most or not self.control.should_continue(_confidences(drafts)):
                return

    def _to_the_end(self, tokens: Sequence[int]) -> Sequence[int]:
        """Nothing follows a token that ends the text."""
        end = next((i + 1 for i, token in enumerate(tokens) if self.request.ends(token)), len(tokens))
        return tokens[:end]


def _confidences(drafts: Sequence[DraftToken]) -> list[float]:
    return [draft.confidence for draft in drafts if draft.confidence is not None]
