"""Fault injection: drafts that are wrong where we want them to be, and runs that end in the middle of a round."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from adi.artifact import Exits
from adi.decoding.frontier import BlockPass
from adi.decoding.policies import Policy
from adi.decoding.records import Step
from adi.decoding.requests import DraftToken, Forward, Request
from adi.decoding.scheduler import Observer, Scheduler
from adi.decoding.session import Session
from adi.decoding.speculate import Proposal, Proposing, Strategy
from adi.model.backbone import States
from adi.model.load import Model

Right = Callable[[int], int]
Truth = Callable[[Sequence[int]], int]


@dataclass(frozen=True)
class Scripted(Policy):
    """Verified decoding with drafts from a script: of each round's, ``right(how many)`` are what ``truth`` gives after the
    text, the next is another token, the rest are random; each runs to a random one of the exits, or not at all."""

    truth: Truth
    right: Right
    exits: Exits
    drafts: int = 5
    seed: int = 0
    mode: ClassVar[str] = "scripted"

    def strategy(self, request: Request, model: Model) -> Strategy:
        """The same script from its beginning."""
        return Strategy(Script(self, model.backbone.spec.vocabulary, random.Random(self.seed)), self.drafts, exits=self.exits)


@dataclass
class Script:
    """Proposes by the script."""

    policy: Scripted
    vocabulary: int
    dice: random.Random

    def propose(self, text: Sequence[int], most: int) -> Proposing:
        """Drafts right, wrong and random, some of them run part-way."""
        drafts: list[DraftToken] = []
        right, known = self.policy.right(most), len(text) - 1
        tokens = list(text)
        for place in range(most):
            depth = self.dice.choice((0, *self.policy.exits.depths))
            if depth:
                yield Forward(known, tuple(tokens[known:]), depth)
                known = len(tokens)
            true = self.policy.truth(tokens) if place <= right else -1
            tokens.append(true if place < right else self._other(true))
            drafts.append(DraftToken(tokens[-1], depth))
        return Proposal(known, drafts)

    def on_verified(self, accepted: int) -> None:
        """The script is fixed."""

    def _other(self, true: int) -> int:
        token = self.dice.randrange(self.vocabulary - 1) if self.vocabulary > 1 else true
        return token + (token >= true) if true >= 0 else token


class _StatesLostError(Exception):
    """A pass has run, and its states are lost."""


@dataclass
class _Passes(Observer[Any]):
    """Counts passes; the one of number ``lost`` loses its states."""

    lost: int | None = None
    ran: int = 0

    def on_pass(self, sequence: Any, done: BlockPass, states: States) -> None:
        self.ran += 1
        if self.ran == self.lost:
            raise _StatesLostError


def drive(session: Session, passes: int | None = None, lost: bool = False) -> list[Step]:
    """The steps of a session before it is interrupted, which is after ``passes`` passes (None: never), or with ``lost`` in the
    next one: that runs, and its states are lost."""
    seen = _Passes(passes + 1 if lost and passes is not None else None)
    steps: list[Step] = []
    with Scheduler(session.model.backbone, observer=seen) as scheduler:
        scheduler.add(session)
        try:
            while scheduler.busy and (lost or passes is None or seen.ran < passes):
                steps += [event for _, event in scheduler.step() if isinstance(event, Step)]
        except _StatesLostError:
            pass
    for error in scheduler.failed.values():
        raise error
    return steps
