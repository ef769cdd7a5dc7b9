"""The frontier: every position's deepest state so far, and how many positions each layer has processed.

``filled`` never rises with depth: it is a staircase. One primitive, ``advance(to)``, runs for every layer below ``to`` the
positions that this layer has not seen. Prefill, drafting, resuming and verifying are all that one step, so nothing is
ever computed twice and nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adi.model.backbone import Backbone, Rows, States


@dataclass(frozen=True)
class Pass:
    """Blocks [lo, hi), which all stand at the same position, over the rows that they have not seen."""

    rows: Rows
    lo: int
    hi: int


@dataclass(frozen=True)
class Score:
    """A session's wish for the likeliest token of each of these states by the model's own head, or for the ``whole`` logits."""

    hidden_TD: Tensor
    whole: bool = False

    def met(self, backbone: Backbone) -> Any:
        """A token per row, or ``logits_TV``."""
        return backbone.logits(self.hidden_TD) if self.whole else backbone.greedy(self.hidden_TD)


class Frontier:
    """One sequence's progress through the layers.

    ``row_blocks`` counts rows times blocks run so far, ``block_passes`` blocks run however many rows they carried.
    """

    def __init__(self, backbone: Backbone, *, mlp: bool = False) -> None:
        self.backbone = backbone
        self.ids: list[int] = []
        self.filled = [0] * backbone.spec.layers
        self.row_blocks = 0
        self.block_passes = 0
        self.last: States | None = None
        self.mlp = mlp
        self.cache = backbone.new_cache()
        self._hidden_TD: Tensor | None = None

    @property
    def length(self) -> int:
        return len(self.ids)

    def append(self, ids: Sequence[int]) -> None:
        """Put tokens at the end; nothing runs yet."""
        self.ids.extend(ids)

    def rollback(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        assert 0 <= length <= self.length, f"cannot roll back from {self.length} to {length}"
        del self.ids[length:]
        self.filled = [min(f, length) for f in self.filled]

    def next_pass(self, to: int) -> Pass | None:
        """The lowest blocks below ``to`` that lag behind, as many as stand level; None when all have caught up."""
        if to == 0 or self.filled[to - 1] == self.length:  # it never rises with depth, so the last one tells for all
            return None
        lo, hi = 0, to
        if self.filled[0] != self.filled[to - 1]:
            lo = next(layer for layer in range(to) if self.filled[layer] < self.length)
            hi = next((layer for layer in range(lo, to) if self.filled[layer] != self.filled[lo]), to)
        start = self.filled[lo]
        hidden_TD = self._hidden_TD[start : self.length].clone() if lo and self._hidden_TD is not None else None
        return Pass(Rows(self.cache, start, tuple(self.ids[start:]), hidden_TD), lo, hi)

    def absorb(self, done: Pass, states: States) -> None:
        """Take in what a pass gave: its rows are now as deep as it went."""
        start, end = done.rows.start, done.rows.start + len(done.rows.ids)
        self._hidden_TD = _room(self._hidden_TD, states.hidden_TD, start, end)
        self._hidden_TD[start:end] = states.hidden_TD
        self.filled[done.lo : done.hi] = [end] * (done.hi - done.lo)
        self.row_blocks += (end - start) * (done.hi - done.lo)
        self.block_passes += done.hi - done.lo
        self.last = states

    def advance(self, to: int) -> None:
        """Bring every position to depth ``to``: for each layer below it, the positions that layer has not seen."""
        while (ahead := self.next_pass(to)) is not None:
            (states,) = self.backbone.forward([ahead.rows], ahead.lo, ahead.hi, mlp=self.mlp)
            self.absorb(ahead, states)

    def propagate(self) -> None:
        """Give the blocks that the newest positions have not run keys and values made from their states so far: they count as
        filled. An approximation, of engines that can (``checks`` refuses others)."""
        depth = next((layer for layer, filled in enumerate(self.filled) if filled < self.length), None)
        if depth is None:
            return
        start = self.filled[depth]
        assert self.filled[-1] == start, "one exit at a time"
        rows = Rows(self.cache, start, tuple(self.ids[start:]), self.hidden(start, self.length).clone())
        self.backbone.propagate(rows, depth)  # type: ignore[attr-defined]
        self.filled = [self.length] * len(self.filled)

    def close(self) -> None:
        """Give back KV memory, where the engine wants it back; nothing can run afterwards."""
        close = getattr(self.cache, "close", None)
        if close is not None:
            close()

    def hidden(self, start: int, end: int) -> Tensor:
        """The deepest states so far of positions [start, end), ``[T, D]``."""
        assert self._hidden_TD is not None, "nothing has run yet"
        return self._hidden_TD[start:end]


def _room(buffer: Tensor | None, new: Tensor, used: int, needed: int) -> Tensor:
    """A buffer for at least ``needed`` positions that keeps the first ``used``."""
    if buffer is not None and buffer.shape[0] >= needed:
        return buffer
    grown = torch.empty((max(64, 1 << (needed - 1).bit_length()), new.shape[-1]), dtype=new.dtype, device=new.device)
    if buffer is not None:
        grown[:used] = buffer[:used]
    return grown
