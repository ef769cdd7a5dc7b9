"""What a pass costs on this machine: blocks and head, by number of rows. Wall-clock medians after a warm-up."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

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


def measure_cost(backbone: Backbone, rows: Sequence[int] = ROWS, repeats: int = 9) -> Cost:
    """Time blocks and head on this machine. The block figure is half the stack's over its blocks, so that the price of
    entering an engine is spread as it is in use."""
    layers, cache = backbone.spec.layers, backbone.new_cache()
    past = min(PAST, (backbone.spec.context or 2 * PAST) - max(rows))
    if past < 1:
        raise ValueError(f"a context of {backbone.spec.context} tokens is too short to measure passes of {max(rows)} rows.")
    ids = tuple(i % backbone.spec.vocabulary for i in range(past))
    hidden_TD = None
    for lo, hi in ((0, max(1, layers // 2)), (max(1, layers // 2), layers)):
        if lo < hi:
            hidden_TD = backbone.forward([Rows(cache, 0, ids, hidden_TD)], lo, hi)[0].hidden_TD
    block, blocks, head = [], [], []
    middle = max(1, layers // 2)
    for count in rows:
        more = tuple(i % backbone.spec.vocabulary for i in range(count))
        deep_TD = backbone.forward([Rows(cache, past, more, None)], 0, layers)[0].hidden_TD
        part = Rows(cache, past, more, None)
        block.append(seconds(functools.partial(backbone.forward, [part], 0, middle), repeats) / middle)
        blocks.append(seconds(functools.partial(backbone.forward, [part], 0, layers), repeats))
        head.append(seconds(functools.partial(backbone.logits, deep_TD), repeats))
    return Cost(tuple(rows), tuple(block), tuple(blocks), tuple(head))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall-clock seconds of ``work``, after two runs that are not counted."""
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
