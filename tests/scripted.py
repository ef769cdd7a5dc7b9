"""A scripted world in a model's place: decoding logic only ever sees what it asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from adi.decoding.drafting.cost_model import CostModel
from adi.decoding.drafting.proposers import ControlledProposer, ExitProposer, FixedLength, NgramSources, NoDrafts
from adi.decoding.drafting.rounds import DraftRound, draft_together
from adi.decoding.reflex import Unverified
from adi.decoding.requests import DraftToken, Emitted, Fallback, Forward, Request, SequenceLogic
from adi.decoding.speculate import Strategy, Verification, speculate
from adi.drafters.ngram import NgramIndex
from adi.exits.triggers import Threshold, Trigger

LAYERS, END = 10, 99


@dataclass(frozen=True)
class Said:
    depth: int
    token: int
    signals: Mapping[str, float] = field(default_factory=lambda: {"margin": 1.0})


@dataclass
class World:
    """Answers requests: ``truth[i]`` is the full model's token at output position i given a correct past, ``early(depth,
    i)`` what an exit gives there and how sure it is. Off the true path everything is 0. ``fell`` is the number of tokens that
    were final when a sequence fell back."""

    prompt: int
    truth: list[int]
    early: Callable[[int, int], tuple[int, float]]
    fell: int | None = None

    def run(self, sequence: SequenceLogic) -> tuple[list[Emitted], list[Forward], int]:
        ids: list[int] = []
        said, asked, proposed, reply = [], [], 0, None
        while True:
            try:
                item = next(sequence) if reply is None else sequence.send(reply)
            except StopIteration:
                return said, asked, proposed
            reply = None
            if isinstance(item, Forward):
                asked.append(item)
                assert 0 <= item.keep <= len(ids)
                ids[item.keep :] = item.ids
                rows = range(len(ids) - item.read, len(ids))
                reply = [self._read(item.to, row, ids) for row in rows]
            elif isinstance(item, DraftRound):
                draft_together([item])
            elif isinstance(item, DraftToken):
                proposed += 1
            elif isinstance(item, Fallback):
                self.fell = len(said)
            else:
                said.append(item)

    def _read(self, depth: int, row: int, ids: list[int]) -> Said:
        at = row - self.prompt + 1
        if ids[self.prompt : row + 1] != self.truth[: max(at, 0)]:
            return Said(depth, 0)
        if depth == LAYERS:
            return Said(depth, self.truth[at])
        token, margin = self.early(depth, at)
        return Said(depth, token, {"margin": margin})


class UntaughtCosts(CostModel):
    """Costs that no clock moves."""

    def passed(self, rows: int, seconds: float) -> None: ...
    def drafted(self, seconds: float, first: bool = True, sequences: int = 1) -> None: ...


@dataclass
class ScriptedDrafter:
    """In a drafter's place: ``guess`` gives token and confidence for a sequence and a place, which are its state."""

    guess: Callable[[int, int], tuple[int, float]]
    calls: list[int] = field(default_factory=list)  # sequences of each

    def start(self, sequence: int, place: int = 0) -> Any:
        return np.array([[sequence, place]])

    def step(self, tokens: Sequence[int], state_TD: Any) -> tuple[list[Any], Any]:
        self.calls.append(len(tokens))
        found = [self.guess(*row) for row in state_TD.tolist()]
        return [SimpleNamespace(token=t, signals={"top_probability": sure}) for t, sure in found], state_TD + np.array([[0, 1]])


def request(prompt: int, budget: int) -> Request:
    return Request(tuple(range(prompt)), budget, LAYERS, lambda token: token == END)


STOPS, SURE = (3, 6), Threshold("margin", 0.5)


def full_depth(wanted: Request) -> SequenceLogic:
    return speculate(wanted, Strategy(NoDrafts(), 0))


def verified(wanted: Request, drafts: int, stops: tuple[int, ...] = STOPS, trigger: Trigger = SURE) -> SequenceLogic:
    """Drafts from exits."""
    return speculate(wanted, Strategy(ExitProposer(wanted, stops, trigger), drafts))


def reflex(
    wanted: Request, checks: Verification | None = None, stops: tuple[int, ...] = STOPS, trigger: Trigger = SURE
) -> SequenceLogic:
    """Early exit, verified where ``checks`` are due; after drift at most four drafts a round."""
    return speculate(wanted, Strategy(ExitProposer(wanted, stops, trigger), 4, checks or Unverified()))


def lookup(wanted: Request, drafts: int, ngram: int) -> SequenceLogic:
    proposer = ControlledProposer(wanted, FixedLength(), NgramSources((), NgramIndex(ngram)), False)
    return speculate(wanted, Strategy(proposer, drafts))


TRUTH = st.lists(st.integers(1, 5), min_size=30, max_size=30)
GUESSES = st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0.1, 0.9])), min_size=60, max_size=60)
