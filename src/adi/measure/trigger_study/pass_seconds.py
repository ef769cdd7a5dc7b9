"""What a pass costs on this machine: blocks and head, by number of rows. Wall-clock medians after a warm-up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from adi.decoding.drafting.cost_model import PAST, interpolate, rising, seconds_in_turn
from adi.errors import UsageError
from adi.model.backbone import Backbone, Rows

ROWS = (1, 2, 4, 8)


@dataclass(frozen=True)
class PassSeconds:
    """Measured seconds by number of rows, after up to 64 positions: one block (of the first half), all blocks, the head.

    From the two depths follows what entering a pass costs and what each block adds. More rows never cost less, whatever the
    clock of a busy machine says: or choices would be made by its noise. Between measured rows and beyond, straight lines.
    """

    layers: int
    rows: tuple[int, ...]
    block_seconds: tuple[float, ...]
    blocks_seconds: tuple[float, ...]
    head_seconds: tuple[float, ...]

    @functools.cached_property
    def entry(self) -> float:
        """What a pass costs before its first block."""
        layers, half = self.layers, max(1, self.layers // 2)
        if layers == half:
            return 0.0
        pairs = zip(self.block_seconds, self.blocks_seconds, strict=True)
        return max(0.0, median((layers * half * one - half * whole) / (layers - half) for one, whole in pairs))

    @functools.cached_property
    def _block(self) -> dict[int, float]:
        return rising(self.rows, [(seconds - self.entry) / self.layers for seconds in self.blocks_seconds])

    @functools.cached_property
    def _head(self) -> dict[int, float]:
        return rising(self.rows, self.head_seconds)

    def through(self, blocks: int, rows: int) -> float:
        """A pass of so many rows through so many blocks."""
        return self.entry + blocks * interpolate(self._block, rows)

    def head(self, rows: int) -> float:
        """The model's own head on so many rows."""
        return interpolate(self._head, rows)

    def full(self, rows: int = 1) -> float:
        """A full pass: all blocks and the head."""
        return self.through(self.layers, rows) + self.head(rows)


def measure_passes(backbone: Backbone, rows: Sequence[int] = ROWS, repeats: int = 11) -> PassSeconds:
    """Time blocks and head on this machine, all row counts in turn, so that a drift of its speed meets all of them alike.

    The block figure is half the stack's over its blocks, so that the price of entering an engine is spread as it is in use.
    """
    spec = backbone.spec
    layers, middle = spec.layers, max(1, spec.layers // 2)
    past = min(PAST, (spec.context or 2 * PAST) - max(rows))
    if past < 1:
        raise UsageError(f"a context of {spec.context} tokens is too short to measure passes of {max(rows)} rows.")
    ids = tuple(i % spec.vocabulary for i in range(past + max(rows)))
    work: list[Callable[[], object]] = []
    with backbone.new_cache() as cache:
        backbone.forward([Rows(cache, 0, ids[:past], None)], 0, layers)
        for count in rows:
            part = Rows(cache, past, ids[past : past + count], None)
            (deep,) = backbone.forward([part], 0, layers)
            work += [
                functools.partial(backbone.forward, [part], 0, middle),
                functools.partial(backbone.forward, [part], 0, layers),
                functools.partial(backbone.greedy, deep.raw_TD),  # what decoding asks: no copy of a large vocabulary
            ]
        times = median_seconds(work, repeats)
    return PassSeconds(layers, tuple(rows), tuple(t / middle for t in times[::3]), tuple(times[1::3]), tuple(times[2::3]))


def median_seconds(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median wall-clock seconds of each piece of work, run in turn, after two rounds that are not counted."""

    def whole(work: Callable[[], object]) -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    times = seconds_in_turn([functools.partial(whole, work) for work in works], repeats + 2)
    return [median(mine[2:]) for mine in times]
