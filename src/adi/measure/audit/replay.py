"""Replay: a run that was drafted and rolled back at random, against one full pass over the same text.

What rounding alone does is measured beside it: ordinary decoding, token by token, against that same pass. A drafted run may be
four times as far off, and a hundred-thousandth of a typical position's largest value; an error in the frontier is far
beyond that. Ordinary decoding is judged too, or a broken engine would excuse whatever it does: by a share of what it gives.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adi.decoding.frontier import Frontier
from adi.model.backbone import Backbone, KVCache, Rows

TIMES, SHARE = 4.0, 1e-5
ROUNDING = {"fp32": 1e-3}  # of a position's largest value, that ordinary decoding may be off by
COARSE = 0.1  # the same with fewer bits
MOST = 5  # drafts in a row
JUMP = 0.3  # chance that blocks run without stopping at the depths between


@dataclass(frozen=True)
class StateDrift:
    """Largest differences from one full pass: of ``drafted``, of ``plain`` decoding, and what is ``allowed``; ``size`` is the
    largest value of a typical position. ``rough`` is by what share of its position plain decoding is off at most, and ``most``
    what that may be. ``of`` is "states", "memory" (keys and values of the blocks since the depth before) or "logits"."""

    of: str
    depth: int
    drafted: float
    plain: float
    size: float
    rough: float = 0.0
    most: float = ROUNDING["fp32"]

    @property
    def allowed(self) -> float:
        return TIMES * self.plain + SHARE * self.size

    @property
    def within(self) -> bool:
        return self.drafted <= self.allowed  # False for NaN

    @property
    def sound(self) -> bool:
        """Whether plain decoding is off by no more than rounding can be."""
        return self.rough <= self.most


@dataclass(frozen=True)
class Replay:
    """``rollbacks`` says how often so many positions were rolled back."""

    positions: int
    rollbacks: dict[int, int]
    drifts: tuple[StateDrift, ...]

    @property
    def noise(self) -> float:
        """What a logit may be off by rounding."""
        return next(d.allowed for d in self.drifts if d.of == "logits")


@dataclass
class RecordedRun:
    """States at each depth ``[T, D]`` and which of them were seen ``[T]``, the logits and the KV memory of one run."""

    at: dict[int, Tensor]
    seen: dict[int, Tensor]
    logits_TV: Tensor
    memory: list[Tensor | None]


def replay(backbone: Backbone, ids: Sequence[int], start: int, depths: Sequence[int], seed: int) -> Replay:
    """Three runs over ``ids``, of which the first ``start`` are the prompt: in one pass, token by token, drafted."""
    ends = (*depths, backbone.spec.layers)
    dice = random.Random(seed)
    player = Player(backbone, ends, dice)
    whole = _straight(backbone, ids, [len(ids)], ends)
    plain = _straight(backbone, ids, [start, *[1] * (len(ids) - start)], ends)
    drafted = player.play(ids, start)
    runs = (whole, plain, drafted)
    most = ROUNDING.get(backbone.spec.precision, COARSE)
    drifts = [_drift("states", d, most, *(run.at[d][drafted.seen[d]] for run in runs)) for d in ends if drafted.seen[d].any()]
    before = 0
    for depth in ends:
        one, two, three = (_memory(run, before, depth) for run in runs)
        if one is not None and two is not None and three is not None:
            drifts.append(_drift("memory", depth, most, one, two, three))
        before = depth
    drifts.append(_drift("logits", ends[-1], most, *(run.logits_TV for run in runs)))
    return Replay(len(ids), player.rollbacks, tuple(drifts))


def _straight(backbone: Backbone, ids: Sequence[int], pieces: Sequence[int], ends: Sequence[int]) -> RecordedRun:
    """Run ``ids`` in passes of so many rows."""
    seen: dict[int, list[Tensor]] = {depth: [] for depth in ends}
    cache, start = backbone.new_cache(), 0
    for count in pieces:
        hidden_TD, lo = None, 0
        for hi in ends:
            (states,) = backbone.forward([Rows(cache, start, tuple(ids[start : start + count]), hidden_TD)], lo, hi)
            hidden_TD, lo = states.hidden_TD.clone(), hi
            seen[hi].append(hidden_TD)
        start += count
    at = {depth: torch.cat(rows) for depth, rows in seen.items()}
    return _finished(backbone, cache, at, {depth: torch.ones(len(ids), dtype=torch.bool) for depth in ends}, len(ids))


def _finished(backbone: Backbone, cache: KVCache, at: dict[int, Tensor], seen: dict[int, Tensor], length: int) -> RecordedRun:
    layers = backbone.spec.layers
    memory = [backbone.peek(cache, block, length) for block in range(layers)]
    logits = torch.cat([backbone.logits(at[layers][i : i + 32]) for i in range(0, length, 32)])
    cache.close()
    return RecordedRun(at, seen, logits, memory)


def _memory(run: RecordedRun, lo: int, hi: int) -> Tensor | None:
    parts = [part for part in run.memory[lo:hi] if part is not None]
    return torch.cat([part.float().flatten() for part in parts]) if len(parts) == hi - lo else None


def _drift(of: str, depth: int, most: float, whole: Tensor, plain: Tensor, drafted: Tensor) -> StateDrift:
    """NaN anywhere stays NaN, which is within nothing."""
    size_T, off_T = (x.abs().amax(-1) for x in (whole, plain - whole))  # some models have a first position beyond measure
    typical = size_T.median()
    rough = (off_T / size_T.clamp(min=float(typical))).max() if typical > 0 else off_T.max()
    return StateDrift(of, depth, float((drafted - whole).abs().max()), float(off_T.max()), float(typical), float(rough), most)


class Player:
    """Drafts right and wrong tokens to random depths on a frontier, verifies them or is interrupted, and rolls back."""

    def __init__(self, backbone: Backbone, ends: Sequence[int], dice: random.Random) -> None:
        self.frontier, self.backbone, self.ends, self.dice = Frontier(backbone), backbone, ends, dice
        self.rollbacks: dict[int, int] = {}
        self.at: dict[int, Tensor] = {}
        self.seen: dict[int, Tensor] = {}

    def play(self, ids: Sequence[int], start: int) -> RecordedRun:
        """Until all of ``ids`` stand."""
        frontier, vocabulary, length = self.frontier, self.backbone.spec.vocabulary, len(ids)
        width = self.backbone.spec.width
        self.at = {depth: torch.zeros(length + MOST, width) for depth in self.ends}
        self.seen = {depth: torch.zeros(length + MOST, dtype=torch.bool) for depth in self.ends}
        frontier.append(ids[:start])
        self._advance(self.ends[-1])
        stands = start
        while stands < length:
            drafts = self.dice.randrange(1, MOST + 1)
            right = self.dice.randrange(drafts + 1)
            for i in range(drafts):
                place = stands + i
                token = ids[place] if i < right and place < length else self.dice.randrange(vocabulary)
                frontier.append([token])
                self._advance(self.dice.choice((0, *self.ends[:-1])))
            if self.dice.random() < 0.8:  # else it is interrupted before it has verified
                self._advance(self.ends[-1])
            stands = min(stands + right, length)
            back = frontier.length - stands
            self.rollbacks[back] = self.rollbacks.get(back, 0) + 1
            frontier.rollback(stands)
        self._advance(self.ends[-1])
        at, seen = ({d: rows[:length] for d, rows in kept.items()} for kept in (self.at, self.seen))
        return _finished(self.backbone, frontier.cache, at, seen, length)

    def _advance(self, to: int) -> None:
        jump = self.dice.random() < JUMP
        for depth in self.ends:
            if depth <= to and (depth == to or not jump):
                while (ahead := self.frontier.next_pass(depth)) is not None:
                    (states,) = self.backbone.forward([ahead.rows], ahead.lo, ahead.hi)
                    self.frontier.absorb(ahead, states)
                    self._see(ahead.rows.start, ahead.lo, ahead.hi, states.hidden_TD)

    def _see(self, start: int, lo: int, hi: int, hidden_TD: Tensor) -> None:
        end = start + hidden_TD.shape[0]
        for depth in self.ends:
            if lo < depth < hi:
                self.seen[depth][start:end] = False  # these rows went past it
        self.at[hi][start:end], self.seen[hi][start:end] = hidden_TD, True
