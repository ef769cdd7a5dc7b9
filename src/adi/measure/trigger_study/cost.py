"""What a pass costs on this machine: blocks and head, by number of rows. Wall-clock medians after a warm-up."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adi.errors import AdiError
from adi.model.backbone import Backbone, Rows

PAST = 64
ROWS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Cost:
    """Seconds by number of rows, with up to 64 positions of past: one block (of the first half), all blocks, the head."""

    rows: tuple[int, ...]
    block_seconds: tuple[float, ...]
    blocks_seconds: tuple[float, ...]
    head_seconds: tuple[float, ...]

    @property
    def full_seconds(self) -> float:
        """A full pass of one row: all blocks and the head."""
        return self.blocks_seconds[0] + self.head_seconds[0]


def measure_cost(backbone: Backbone, rows: Sequence[int] = ROWS, repeats: int = 11) -> Cost:
    """Time blocks and head on this machine, all row counts in turn, so that a drift of its speed meets all of them alike.

    The block figure is half the stack's over its blocks, so that the price of entering an engine is spread as it is in use.
    """
    layers, cache = backbone.spec.layers, backbone.new_cache()
    past = min(PAST, (backbone.spec.context or 2 * PAST) - max(rows))
    if past < 1:
        raise AdiError(f"a context of {backbone.spec.context} tokens is too short to measure passes of {max(rows)} rows.")
    tokens = [i % backbone.spec.vocabulary for i in range(past + max(rows))]
    backbone.forward([Rows(cache, 0, tuple(tokens[:past]), None)], 0, layers)
    middle = max(1, layers // 2)
    work: list[Callable[[], object]] = []
    for count in rows:
        part = Rows(cache, past, tuple(tokens[past : past + count]), None)
        deep_TD = backbone.forward([part], 0, layers)[0].hidden_TD
        work += [
            functools.partial(backbone.forward, [part], 0, middle),
            functools.partial(backbone.forward, [part], 0, layers),
            functools.partial(backbone.greedy, deep_TD),  # what decoding asks: no copy of a large vocabulary
        ]
    times = seconds_in_turn(work, repeats)
    return Cost(tuple(rows), tuple(t / middle for t in times[::3]), tuple(times[1::3]), tuple(times[2::3]))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall-clock seconds of ``work``, after two runs that are not counted."""
    return seconds_in_turn([work], repeats)[0]


def seconds_in_turn(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median wall-clock seconds of each piece of work, run in turn, after two rounds that are not counted."""
    times: list[list[float]] = [[] for _ in works]
    for i in range(repeats + 2):
        for work, mine in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 2:
                mine.append(time.perf_counter() - start)
    return [sorted(mine)[len(mine) // 2] for mine in times]
