"""Where the blocks of a looped model lie in its graph, which holds one turn of them."""

from __future__ import annotations

from collections.abc import Sequence

from adi.model.backbone import Loop

Span = tuple[int, int, int | None]


def in_graph(loop: Loop | None, depth: int) -> int:
    """The depth in the graph at which a pass stops that stops at ``depth``; of the turns' beginning where one turn ends and
    another begins."""
    if loop is None or depth <= loop.first:
        return depth
    past = depth - loop.first - loop.period * loop.turns
    return loop.first + (loop.period + past if past >= 0 else (depth - loop.first) % loop.period)


def cuts(loop: Loop | None, layers: int, stops: Sequence[int]) -> tuple[int, ...]:
    """Where a graph of so many blocks is cut for these stops of the model; at 0 where the first block is one of a turn."""
    edges = () if loop is None else (loop.first, loop.first + loop.period)
    return tuple(sorted({*(in_graph(loop, stop) for stop in stops), *edges, layers}))


def spans(loop: Loop | None, lo: int, hi: int) -> list[Span]:
    """The blocks of the model that the graph's blocks [lo, hi) are, and in which turn: as often as they run."""
    if loop is None or hi <= loop.first:
        return [(lo, hi, None)]
    if lo >= loop.first + loop.period:
        past = loop.period * (loop.turns - 1)
        return [(lo + past, hi + past, None)]
    return [(lo + turn * loop.period, hi + turn * loop.period, turn) for turn in range(loop.turns)]


def block_in_graph(loop: Loop | None, block: int) -> tuple[int, int]:
    """Where a block of the model lies in the graph, and its turn."""
    past = 0 if loop is None else block - loop.first
    if loop is None or past < 0:
        return block, 0
    if past >= loop.period * loop.turns:
        return block - loop.period * (loop.turns - 1), 0
    return loop.first + past % loop.period, past // loop.period
