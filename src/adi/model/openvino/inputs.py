"""What one pass needs beside weights: arrays of fixed shapes that are filled anew for every pass and never handed out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adi.model.arrays import as_array
from adi.model.backbone import Rows, raw_of
from adi.model.openvino.graph import BLOCK_TOKENS

BLOCKS_AT_ONCE = 64  # the list of KV blocks has room for a multiple of this, so that a growing text seldom wants new arrays
ROWS_APART = 64  # a request of up to so many rows is attended row by row, a longer one and a prompt as a whole


@dataclass(frozen=True)
class Layout:
    """How the rows of a pass are shown to attention.

    Each row of a short request is a sequence of its own of one new token, over the same KV blocks: attention then runs one
    kernel, whatever rows are beside it, and so a row's bits do not depend on its company. With several new tokens in a
    sequence the plugin runs another kernel, whose results differ, and which on long texts costs more for few rows and less for
    many: a prompt's, in every pass that reads some of it. Either kernel's bits are a row's own. ``spans`` are
    request, offset and rows of each sequence; ``blocks`` its blocks of KV memory. Empty sequences fill up to one for each
    thread: with fewer, the plugin splits a text among threads, and sums in another order.
    """

    counts: tuple[int, ...]
    spans: tuple[tuple[int, int, int], ...]
    blocks: tuple[int, ...]
    sequences: int

    @classmethod
    def of(cls, rows: Sequence[Rows], least: int) -> Layout:
        spans: list[tuple[int, int, int]] = []
        for i, r in enumerate(rows):
            count = len(r.ids)
            spans += [(i, 0, count)] if r.prompt or count > ROWS_APART else [(i, offset, 1) for offset in range(count)]
        blocks = tuple(-(-(rows[i].start + offset + n) // BLOCK_TOKENS) for i, offset, n in spans)
        return cls(tuple(len(r.ids) for r in rows), tuple(spans), blocks, max(least, len(spans)))

    @property
    def key(self) -> tuple[int, int, int]:
        """Passes with the same key have arrays of the same shapes."""
        room = -(-sum(self.blocks) // BLOCKS_AT_ONCE) * BLOCKS_AT_ONCE
        return sum(self.counts), self.sequences, room


class PassInputs:
    """The inputs of a pass as numpy arrays, and tensors over the same memory; ``states`` holds each stop's output."""

    def __init__(self, rows: int, sequences: int, blocks: int, width: int, turns: int = 0) -> None:
        self.rows, self.turns = rows, turns
        self.arrays: dict[str, Any] = {
            "input_ids": np.zeros((1, rows), np.int64),
            "position_ids": np.zeros((1, rows), np.int64),
            "past_lens": np.zeros(sequences, np.int32),
            "subsequence_begins": np.zeros(sequences + 1, np.int32),
            "block_indices": np.zeros(blocks, np.int32),
            "block_indices_begins": np.zeros(sequences + 1, np.int32),
            "max_context_len": np.zeros((), np.int32),
            "state.0": np.zeros((1, rows, width), np.float32),
        }
        self.arrays |= {f"block_indices.{turn}": np.zeros(blocks, np.int32) for turn in range(turns)}
        self.tensors = {name: _shared(array) for name, array in self.arrays.items()}

    def room(self, name: str, shape: Sequence[int]) -> Any:
        """The tensor of this name, made on first use."""
        if name not in self.tensors:
            self.arrays[name] = np.zeros(tuple(shape), np.float32)
            self.tensors[name] = _shared(self.arrays[name])
        return self.tensors[name]

    def fill(self, rows: Sequence[Rows], layout: Layout) -> None:
        """Write ids, positions and places of these rows."""
        a = self.arrays
        at = 0
        for r, count in zip(rows, layout.counts, strict=True):
            a["input_ids"][0, at : at + count] = r.ids
            a["position_ids"][0, at : at + count] = range(r.start, r.start + count)
            at += count
        numbers = [r.cache.numbers for r in rows]
        first = np.zeros_like(a["block_indices"]) if self.turns else None  # of the turns of each row, its own first
        at = block = longest = 0
        for j, ((i, offset, n), blocks) in enumerate(zip(layout.spans, layout.blocks, strict=True)):
            past = rows[i].start + offset
            a["past_lens"][j] = past
            a["block_indices"][block : block + blocks] = numbers[i][:blocks]
            if first is not None:
                first[block : block + blocks] = rows[i].turn
            at, block, longest = at + n, block + blocks, max(longest, past + n)
            a["subsequence_begins"][j + 1], a["block_indices_begins"][j + 1] = at, block
        for turn in range(self.turns):
            np.add(a["block_indices"] * self.turns, turn + (0 if first is None else first), out=a[f"block_indices.{turn}"])
        used = len(layout.spans)
        a["past_lens"][used:] = 0
        a["subsequence_begins"][used + 1 :] = at
        a["block_indices_begins"][used + 1 :] = block
        a["max_context_len"][()] = longest

    def fill_state(self, name: str, rows: Sequence[Rows], layout: Layout) -> None:
        """Write the states that enter a pass into the array ``name``."""
        array, at = self.arrays[name], 0
        for r, count in zip(rows, layout.counts, strict=True):
            assert r.states is not None, "blocks above the first need the states that enter them"
            assert len(r.states) == count, "one state for each id"
            array[0, at : at + count] = as_array(raw_of(r.states))
            at += count


def _shared(array: Any) -> Any:
    import openvino as ov

    return ov.Tensor(array, shared_memory=True)
