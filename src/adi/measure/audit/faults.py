"""Fault injection: drafts that are wrong where we want them to be, and runs that end in the middle of a round."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from adi.decoding.frontier import BlockPass, HeadPass
from adi.decoding.policies import FullDepth
from adi.decoding.records import Event, Step
from adi.decoding.sampling import Sampling
from adi.decoding.session import Session
from adi.decoding.speculate import DraftToken, Forward, Proposing, Request, speculate
from adi.decoding.strategy import Strategy
from adi.model.load import Model

Right = Callable[[int], int]
Truth = Callable[[Sequence[int]], int]


class Scripted(Session):
    """A session whose drafts come from a script: of each round's, ``right(how many)`` are what ``truth`` says after the text,
    the next is another token, the rest are random; each runs to a random one of ``depths``, or not at all."""

    def __init__(
        self,
        model: Model,
        ids: Sequence[int],
        truth: Truth,
        right: Right,
        *,
        depths: Sequence[int],
        drafts: int,
        seed: int,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(model, list(ids), FullDepth(), max_new_tokens=max_new_tokens, stop_at_eos=False, sampling=sampling)
        script = Script(self.plan, truth, right, depths, random.Random(seed), model.backbone.spec.vocabulary)
        self._logic = Strategy(speculate(self.plan, drafts, script.propose))


class Script:
    """``propose`` for rounds."""

    def __init__(
        self, plan: Request, truth: Truth, right: Right, depths: Sequence[int], dice: random.Random, vocabulary: int
    ) -> None:
        self.plan, self.truth, self.right, self.depths = plan, truth, right, depths
        self.dice, self.vocabulary = dice, vocabulary

    def propose(self, text: Sequence[int], most: int) -> Proposing:
        drafts: list[DraftToken] = []
        right, end = self.right(most), len(text) - 1
        row: tuple[int, ...] = (text[-1],)
        for place in range(most):
            depth = self.dice.choice((0, *self.depths))
            if depth:
                yield Forward(end, row, depth)
                end, row = end + len(row), ()
            true = self.truth((*text, *(d.token for d in drafts))) if place <= right else -1
            token = true if place < right else self._other(true)
            drafts.append(DraftToken(token, depth, ()))
            row = (*row, token)
            yield drafts[-1]
        readings = yield Forward(end, row, self.plan.layers, most + 1)
        return drafts, (), readings

    def _other(self, true: int) -> int:
        token = self.dice.randrange(self.vocabulary - 1) if self.vocabulary > 1 else true
        return token + (token >= true) if true >= 0 else token


def drive(session: Session, passes: int | None = None, lost: bool = False) -> list[Step]:
    """The steps of a session up to the pass of that number, which never runs; ``lost``: it runs, and its states are lost."""
    backbone, steps, work = session.model.backbone, list[Step](), session.work()
    item: BlockPass | HeadPass | Event | Any
    for item in work:
        if isinstance(item, HeadPass):
            session.answer(item.met(backbone))
        elif isinstance(item, BlockPass):
            last = passes is not None and (passes := passes - 1) < 0
            if last and not lost:
                break
            (states,) = backbone.forward([item.rows], item.lo, item.hi)
            if last:
                break
            session.answer((item, states))
        elif isinstance(item, Step):
            steps.append(item)
    work.close()
    return steps
