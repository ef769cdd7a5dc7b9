"""A scripted world in a model's place: decoding logic only ever sees what it asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hypothesis import strategies as st

from adi.decoding.speculate import DraftToken, Emitted, Forward, Request, SequenceLogic
from adi.exits.triggers import Threshold

LAYERS, END = 10, 99


@dataclass(frozen=True)
class Said:
    depth: int
    token: int
    signals: Mapping[str, float] = field(default_factory=lambda: {"margin": 1.0})


@dataclass
class World:
    """Answers requests: ``truth[i]`` is the full model's token at output position i given a correct past, ``early(depth,
    i)`` what an exit says there and how sure it is. Off the true path everything is 0."""

    prompt: int
    truth: list[int]
    early: Callable[[int, int], tuple[int, float]]

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
            elif isinstance(item, DraftToken):
                proposed += 1
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


def plan(prompt: int, budget: int, stops: tuple[int, ...] = (3, 6)) -> Request:
    return Request(tuple(range(prompt)), budget, LAYERS, stops, Threshold("margin", 0.5), lambda token: token == END)


TRUTH = st.lists(st.integers(1, 5), min_size=30, max_size=30)
GUESSES = st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0.1, 0.9])), min_size=60, max_size=60)
