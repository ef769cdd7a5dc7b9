"""Who shares a pass, and how much of a long prompt goes beside those that are answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from adi.decoding.frontier import BlockPass
from adi.model.backbone import Spec

WAIT = 1.5  # ordinary passes, for which others' next tokens may wait for a part of a prompt
FIRST_PART = 16  # rows of a prompt beside others, before it is known how long they take
LEARNING = 0.25  # weight of one more measurement
LEAST_PART = 2  # rows: a lone one would be attended by another kernel

E = TypeVar("E")


def begins_prompt(need: BlockPass) -> bool:
    """Whether these are a prompt's rows that enter the first block."""
    return need.rows.prompt and need.lo == 0


def beside(spec: Spec, lo: int, waiting: Sequence[tuple[E, BlockPass]]) -> list[tuple[E, BlockPass]]:
    """Those that begin at ``lo``, and those that run the same weights in a later turn, where that and their states allow it."""
    found = []
    for entry, need in waiting:
        turn = 0 if need.lo == lo else spec.together.turns_past(lo, need.lo) if spec.together and lo else None
        if turn is not None:
            found.append((entry, replace(need, rows=replace(need.rows, turn=turn)) if turn else need))
    if spec.together and any(need.rows.turn for _, need in found):
        found = [(entry, replace(need, hi=min(need.hi, spec.together.end))) for entry, need in found]
    return found


@dataclass
class Pace:
    """How many rows of a prompt may share a pass with others, so that these wait ``WAIT`` ordinary passes at most: by what
    passes without such rows took lately and how many ``usual`` rows they had, and by how much longer those with some did.
    ``alone``: so many rows of a prompt at most where nobody is answered, since others may come meanwhile."""

    ordinary: float | None = None
    row: float | None = None
    usual: float = 0.0
    alone: int | None = None

    def rows(self, others: int = 0) -> int:
        """Beside so many rows of others; at least two."""
        if self.ordinary is None or self.row is None:
            return max(FIRST_PART, int(WAIT * others))
        return max(LEAST_PART, int(WAIT * self._without(others) / self.row))

    def seen(self, seconds: float, rows: int, others: int = 0) -> None:
        """A pass took so long, with so many rows of prompts beside so many others."""
        if not rows:
            self.ordinary, self.usual = _learned(self.ordinary, seconds), _learned(self.usual or None, others)
        elif self.ordinary is not None:
            self.row = _learned(self.row, max(seconds - self._without(others), 0.01 * self.ordinary) / rows)

    def _without(self, others: int) -> float:
        """What a pass of others' rows alone takes: there may be more of them by now, and nobody without a prompt beside."""
        assert self.ordinary is not None
        return self.ordinary + (self.row or 0.0) * max(0.0, others - self.usual)


def _learned(known: float | None, seen: float) -> float:
    return seen if known is None else known + LEARNING * (seen - known)


def chosen_for(spec: Spec, waiting: Sequence[tuple[E, BlockPass]], pace: Pace | None) -> list[tuple[E, BlockPass]]:
    """Those of the lowest that share a pass, with as much of prompts beside others as these can wait for; without a ``pace``
    nobody minds waiting, and prompts come first."""
    prompts = [(entry, need) for entry, need in waiting if begins_prompt(need)]
    others = [(entry, need) for entry, need in waiting if not begins_prompt(need)]
    if not prompts or spec.chunk > 1 or not (others or pace is None):
        found = [waiting[i] for i in sharing([len(need.rows.ids) for _, need in waiting], spec.merged_rows)]
        alone = None if pace is None or others else pace.alone
        return found if alone is None else [(entry, cut(spec, need, alone)) for entry, need in found]
    if pace is None:
        return filled(spec, [*prompts, *others])
    most = spec.merged_rows
    wanted = pace.rows(min(most, sum(len(need.rows.ids) for _, need in others)))
    part = min(max(wanted, LEAST_PART + 1), most // 2)  # what ``cut`` gives at most where two are wanted
    chosen = [others[i] for i in sharing([len(need.rows.ids) for _, need in others], max(1, most - part))]
    room = most - sum(len(need.rows.ids) for _, need in chosen)
    for entry, need in prompts:
        if min(wanted, room) < LEAST_PART:
            break
        need = cut(spec, need, min(wanted, room))
        if (rows := len(need.rows.ids)) <= room:
            chosen.append((entry, need))
            wanted, room = wanted - rows, room - rows
    return chosen


def rows_beside(spec: Spec, waiting: Sequence[BlockPass], drafting: int, pace: Pace | None) -> int:
    """How many rows of others the next pass will have beside those of so many sequences that may draft for it, as
    ``chosen_for`` puts it together; 0 where they do not all go in one."""
    entering = [need for need in waiting if need.lo == 0]
    prompts, others = (sum(len(n.rows.ids) for n in entering if n.rows.prompt is kind) for kind in (True, False))
    room = spec.merged_rows - drafting - others
    if spec.chunk == 1:
        prompts = min(prompts, max(0, room), spec.merged_rows if pace is None else pace.rows(drafting + others))
    return others + prompts if prompts <= room else 0


def filled(spec: Spec, waiting: Sequence[tuple[E, BlockPass]]) -> list[tuple[E, BlockPass]]:
    """A whole pass: the first ones before others, the last one cut where it is a prompt's. The very first may be longer."""
    chosen: list[tuple[E, BlockPass]] = []
    left = spec.merged_rows
    for entry, need in waiting:
        rows = len(need.rows.ids)
        part = cut(spec, need, left) if chosen and begins_prompt(need) and left >= LEAST_PART else need
        if not chosen or len(part.rows.ids) <= left:
            chosen.append((entry, part))
            left -= min(left, rows)
    return chosen


def cut(spec: Spec, need: BlockPass, rows: int) -> BlockPass:
    """The first of a prompt's rows, where that is as good: never one alone, nor all but one."""
    have = len(need.rows.ids)
    if have <= rows or spec.chunk > 1:
        return need
    rows = max(LEAST_PART, rows - (have - rows == 1))
    return need if rows >= have - 1 else replace(need, rows=replace(need.rows, ids=need.rows.ids[:rows]))


def sharing(counts: Sequence[int], most: int) -> list[int]:
    """The places of those that share a pass (or a call of the head): as many as fit in ``most`` rows together, the first ones
    before others, and the very first whatever it takes. At least one."""
    chosen: list[int] = []
    left = most
    for place, count in enumerate(counts):
        if not chosen or count <= left:
            chosen.append(place)
            left -= count
    return chosen
