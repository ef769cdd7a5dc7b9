"""What one pass needs beside weights: arrays of fixed shapes that are filled anew for every pass and never handed out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adi.model.backbone import Rows
from adi.model.openvino.graph import BLOCK_TOKENS


@dataclass(frozen=True)
class Layout:
    """Where the rows of each sequence lie in a pass: real counts, padded counts, and blocks of KV memory.

    A lone row is doubled. With one row the plugin takes other kernels, whose results differ; from two rows on a row's bits do
    not depend on its company. The double is written one position further on, where nothing is trusted yet.
    """

    counts: tuple[int, ...]
    padded: tuple[int, ...]
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Rows]) -> Layout:
        counts = tuple(len(r.ids) for r in rows)
        padded = tuple(max(2, n) for n in counts)
        ends = (r.start + n for r, n in zip(rows, padded, strict=True))
        return cls(counts, padded, tuple(-(-end // BLOCK_TOKENS) for end in ends))

    @property
    def key(self) -> tuple[int, int, int]:
        """Passes with the same key have arrays of the same shapes."""
        return sum(self.padded), len(self.padded), sum(self.blocks)


class Feed:
    """The inputs of a pass as numpy arrays, and tensors over the same memory; ``states`` holds each stop's output."""

    def __init__(self, rows: int, sequences: int, blocks: int, width: int) -> None:
        self.rows = rows
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
        at = block = longest = 0
        for i, (r, count, padded, blocks) in enumerate(zip(rows, layout.counts, layout.padded, layout.blocks, strict=True)):
            end = at + padded
            a["input_ids"][0, at : at + count] = r.ids
            a["position_ids"][0, at : at + count] = range(r.start, r.start + count)
            if padded > count:
                a["input_ids"][0, end - 1] = r.ids[0]
                a["position_ids"][0, end - 1] = r.start  # the model may have no position after this one
            a["past_lens"][i] = r.start
            a["block_indices"][block : block + blocks] = r.cache.blocks[:blocks]
            at, block, longest = end, block + blocks, max(longest, r.start + padded)
            a["subsequence_begins"][i + 1], a["block_indices_begins"][i + 1] = at, block
        a["max_context_len"][()] = longest

    def fill_state(self, name: str, rows: Sequence[Rows], layout: Layout) -> None:
        """Write the states that enter a pass into the array ``name``."""
        array, at = self.arrays[name], 0
        for r, count, padded in zip(rows, layout.counts, layout.padded, strict=True):
            assert r.hidden_TD is not None, "blocks above the first need the states that enter them"
            array[0, at : at + padded] = r.hidden_TD.detach().numpy()  # a lone row spreads over its double
            at += padded
            assert r.hidden_TD.shape[0] == count, "one state for each id"


def _shared(array: Any) -> Any:
    import openvino as ov

    return ov.Tensor(array, shared_memory=True)
