"""Replay: a run that was drafted and rolled back at random, against the same text as a prompt and one pass over all the rest.

What rounding alone does is measured beside it: ordinary decoding, token by token, against the same. A drafted run may be
four times as far off, and a hundred-thousandth of a typical position's largest value; an error in the frontier is far
beyond that. Ordinary decoding has a bound too, a share of its own values, or a broken engine would excuse whatever it does.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adi.decoding.frontier import BlockPass, Frontier
from adi.decoding.teacher_forcing import full_logits, run_to_stops
from adi.model.backbone import Backbone, KVCache, Rows, States

TIMES, SHARE = 4.0, 1e-5
ROUNDING = {"fp32": 1e-3}  # of a position's largest value, that ordinary decoding may be off by
COARSE = 0.1  # the same with fewer bits
MOST = 5  # drafts in a row
JUMP = 0.3  # chance that blocks run without stopping at the depths between


@dataclass(frozen=True)
class StateDrift:
    """Largest differences from the run in two passes: of ``drafted``, of ``plain`` decoding, and what is ``allowed``; ``size``
    is the largest value of a typical position. ``rough`` is by what share of its position plain decoding is off at most, and
    ``most`` what that may be. ``of`` is "states", "memory" (keys and values of the blocks since the depth before) or
    "logits"."""

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

    def to_json(self) -> dict[str, Any]:
        """``within`` is for both; JSON has no NaN, so None is in its place."""
        sizes = {**asdict(self), "allowed": self.allowed}
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in sizes.items()}
        return {**finite, "within": self.within and self.sound}


@dataclass(frozen=True)
class Replay:
    """``rollbacks`` counts how often so many positions were rolled back."""

    positions: int
    rollbacks: dict[int, int]
    drifts: tuple[StateDrift, ...]

    @property
    def noise(self) -> float:
        """What a logit may be off by rounding."""
        return next(d.allowed for d in self.drifts if d.of == "logits")

    def to_json(self) -> dict[str, Any]:
        rollbacks = {str(k): v for k, v in sorted(self.rollbacks.items())}
        return {"positions": self.positions, "rollbacks": rollbacks, "drifts": [d.to_json() for d in self.drifts]}

    def violations(self, where: str) -> list[str]:
        """Differences beyond what is allowed, in sentences."""
        found = []
        for d in self.drifts:
            what = f"{where}: {d.of} at depth {d.depth} are off by"
            if not d.within:
                found.append(f"{what} {d.drafted:.2g}, {d.allowed:.2g} is allowed")
            if not d.sound:
                found.append(f"{what} {d.rough:.2g} of their size without any drafts, {d.most:.2g} is allowed")
        return found


@dataclass
class RecordedRun:
    """States at each depth ``[T, D]`` and which of them were seen ``[T]``, the logits and the KV memory of one run."""

    at: dict[int, Tensor]
    seen: dict[int, Tensor]
    logits_TV: Tensor
    memory: list[Tensor | None]

    @classmethod
    def of(cls, backbone: Backbone, cache: KVCache, at: dict[int, Tensor], seen: dict[int, Tensor], length: int) -> RecordedRun:
        """With logits and memory as they are at its end."""
        layers = backbone.spec.layers
        memory = [backbone.peek(cache, block, length) for block in range(layers)]
        return cls(at, seen, torch.cat(list(full_logits(backbone, at[layers]))), memory)

    def memory_of(self, lo: int, hi: int) -> Tensor | None:
        """Keys and values of blocks ``[lo, hi)``, where the engine shows them."""
        parts = [part for part in self.memory[lo:hi] if part is not None]
        return torch.cat([part.float().flatten() for part in parts]) if len(parts) == hi - lo else None


def replay(backbone: Backbone, ids: Sequence[int], start: int, depths: Sequence[int], seed: int) -> Replay:
    """Three runs over ``ids``, of which the first ``start`` are the prompt: the rest in one pass, token by token, drafted."""
    ends = (*depths, backbone.spec.layers)
    random_run = RandomDrafts(backbone, ends, random.Random(seed))
    whole = _straight(backbone, ids, [start, len(ids) - start], ends)
    plain = _straight(backbone, ids, [start, *[1] * (len(ids) - start)], ends)
    drafted = random_run.run(ids, start)
    runs = (whole, plain, drafted)
    most = ROUNDING.get(backbone.spec.precision, COARSE)
    drifts = [_drift("states", d, most, *(run.at[d][drafted.seen[d]] for run in runs)) for d in ends if drafted.seen[d].any()]
    for lo, hi in zip((0, *ends[:-1]), ends, strict=True):
        memories = [memory for run in runs if (memory := run.memory_of(lo, hi)) is not None]
        if len(memories) == len(runs):
            drifts.append(_drift("memory", hi, most, *memories))
    drifts.append(_drift("logits", ends[-1], most, *(run.logits_TV for run in runs)))
    return Replay(len(ids), random_run.rollbacks, tuple(drifts))


def _straight(backbone: Backbone, ids: Sequence[int], pieces: Sequence[int], ends: Sequence[int]) -> RecordedRun:
    """Run ``ids`` in passes of so many rows, the first over the prompt."""
    rows: dict[int, list[Tensor]] = {depth: [] for depth in ends}
    start = 0
    with backbone.new_cache() as cache:
        for count in pieces:
            piece = Rows(cache, start, tuple(ids[start : start + count]), None, prompt=start == 0)
            for depth, (states,) in run_to_stops(backbone, [piece], ends):
                rows[depth].append(states.hidden_TD.clone())
            start += count
        at = {depth: torch.cat(parts) for depth, parts in rows.items()}
        return RecordedRun.of(backbone, cache, at, {depth: torch.ones(len(ids), dtype=torch.bool) for depth in ends}, len(ids))


def _drift(of: str, depth: int, most: float, whole: Tensor, plain: Tensor, drafted: Tensor) -> StateDrift:
    """NaN anywhere stays NaN, which is within nothing."""
    size_T, off_T = (x.abs().amax(-1) for x in (whole, plain - whole))  # some models have a first position beyond measure
    typical = size_T.median()
    rough = (off_T / size_T.clamp(min=float(typical))).max() if typical > 0 else off_T.max()
    return StateDrift(of, depth, float((drafted - whole).abs().max()), float(off_T.max()), float(typical), float(rough), most)


class RandomDrafts:
    """Drafts right and wrong tokens to random depths on a frontier, verifies them or is interrupted, and rolls back."""

    def __init__(self, backbone: Backbone, ends: Sequence[int], dice: random.Random) -> None:
        self.backbone, self.ends, self.dice = backbone, ends, dice
        self.rollbacks = Counter[int]()

    def run(self, ids: Sequence[int], start: int) -> RecordedRun:
        """Until all of ``ids`` are verified."""
        spec, length = self.backbone.spec, len(ids)
        self._frontier = Frontier(self.backbone)
        self._at = {depth: torch.zeros(length + MOST, spec.width) for depth in self.ends}
        self._seen = {depth: torch.zeros(length + MOST, dtype=torch.bool) for depth in self.ends}
        with self._frontier.cache as cache:
            self._frontier.read(ids[:start])
            self._advance(self.ends[-1])
            verified = start
            while verified < length:
                verified = self._round(ids, verified)
            self._advance(self.ends[-1])
            at, seen = ({d: rows[:length] for d, rows in kept.items()} for kept in (self._at, self._seen))
            return RecordedRun.of(self.backbone, cache, at, seen, length)

    def _round(self, ids: Sequence[int], verified: int) -> int:
        """Draft, verify or not, roll back; how many tokens are verified then."""
        drafts = self.dice.randrange(1, MOST + 1)
        right = self.dice.randrange(drafts + 1)
        for place in range(verified, verified + drafts):
            is_right = place < min(verified + right, len(ids))
            self._frontier.append([ids[place] if is_right else self.dice.randrange(self.backbone.spec.vocabulary)])
            self._advance(self.dice.choice((0, *self.ends[:-1])))
        if self.dice.random() < 0.8:  # else it is interrupted before it has verified
            self._advance(self.ends[-1])
        verified = min(verified + right, len(ids))
        self.rollbacks[self._frontier.length - verified] += 1
        self._frontier.rollback(verified)
        return verified

    def _advance(self, to: int) -> None:
        jump = self.dice.random() < JUMP
        for depth in self.ends:
            if depth <= to and (depth == to or not jump):
                self._frontier.advance(depth, self._record)

    def _record(self, done: BlockPass, states: States) -> None:
        start, end = done.rows.start, done.rows.start + len(states)
        for depth in self.ends:
            if done.lo < depth < done.hi:
                self._seen[depth][start:end] = False  # these rows went past it
        self._at[done.hi][start:end], self._seen[done.hi][start:end] = states.hidden_TD, True
