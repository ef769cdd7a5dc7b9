"""KV memory whose layers may hold different numbers of positions, as transformers' own attention modules expect it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from adi.model.backbone import KVCache
from adi.model.hf.passes import Written


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of all positions so far, in a buffer that doubles; going back is a smaller ``length``.

    Sliding-window layers keep everything too: the mask hides what lies outside the window, and any rollback stays
    possible.
    """

    def __init__(self, sliding: bool) -> None:
        super().__init__()
        self.is_sliding = sliding
        self.length = 0
        self.write_only = False
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        self.keys = _room(self.keys, key_states, self.length, end)
        self.values = _room(self.values, value_states, self.length, end)
        self.is_initialized = True
        self.keys[..., self.length : end, :] = key_states
        self.values[..., self.length : end, :] = value_states
        self.length = end
        if self.write_only:
            raise Written
        return self.keys[..., :end, :], self.values[..., :end, :]

    def get_seq_length(self) -> int:
        return self.length


def _room(buffer: Tensor | None, new: Tensor, used: int, needed: int) -> Tensor:
    if buffer is not None and buffer.shape[-2] >= needed:
        return buffer
    *lead, _, width = new.shape
    grown = new.new_empty((*lead, max(64, 1 << (needed - 1).bit_length()), width))
    if buffer is not None:
        grown[..., :used, :] = buffer[..., :used, :]
    return grown


class StaircaseCache(KVCache, DynamicCache):  # type: ignore[misc]
    """A cache that is given where the next rows start instead of deriving it from its first layer.

    While blocks ``[lo, hi)`` run, every one of them holds exactly ``start`` positions, so lengths and mask sizes have
    one answer for all layers.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(config=model.config)
        self.model = model  # that its sequence began with
        self.far = None if model.far is None else StaircaseCache(model.far)  # of a text past the edge of its rotary angles
        self.edge, self.ids = model.edge, list[int]()
        self.start = 0
        for i, layer in enumerate(self.layers):
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                self.layers[i] = GrowingLayer(sliding=layer.is_sliding)
        self.activate_past_recording()
        self.make_room(max((slot for slots in model.slots or () for slot in slots), default=0))

    def make_room(self, slot: int) -> None:
        """Have a layer of this number: a looped model may write more of them than its configuration says."""
        while self.model.loop is not None and len(self.layers) <= slot:
            self.layers.append(GrowingLayer(sliding=False))

    def fork(self, length: int) -> StaircaseCache:
        """Another cache with the first ``length`` positions of this one."""
        made = copy.copy(self)
        made.layers = copy.deepcopy(self.layers)
        made.rewind(0, len(made.layers), length)
        return made

    def close(self) -> None:
        """Free keys and values of all blocks."""
        self.layers.clear()
        if self.far is not None:
            self.far.close()

    def unsupported(self) -> str | None:
        """Why this cache cannot go back, or None when it can. Known for sure after the first pass."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, LinearAttentionLayer) and any(layer.is_recurrent_states_initialized.values()):
                return f"block {i} keeps a recurrent state, which cannot be rolled back"
            if type(layer) not in (GrowingLayer, LinearAttentionLayer) and not _is_dummy(layer):
                return f"block {i} keeps a {type(layer).__name__}, which adi does not know how to roll back"
        return None

    def peek(self, block: int, length: int) -> Tensor | None:
        """Keys and values of the first ``length`` positions in one block, where it has that many."""
        if self.far is not None and length > self.edge:
            return self.far.peek(block, length)
        layer = next(iter(self._layers_of([block])), None) if block < len(self.model.blocks) else None
        if not isinstance(layer, GrowingLayer) or layer.keys is None or layer.values is None or layer.length < length:
            return None
        if layer.keys.shape != layer.values.shape:
            return torch.cat([part[..., :length, :].flatten() for part in (layer.keys, layer.values)])
        return torch.stack([layer.keys[..., :length, :], layer.values[..., :length, :]])

    def write_only(self, wanted: bool) -> bool:
        """Whether blocks are to be left once their keys and values are written; False where some layer cannot do that."""
        single = self.model.slots is None or all(len(slots) == 1 for slots in self.model.slots)
        able = single and all(isinstance(layer, GrowingLayer) for layer in self.layers)
        for layer in self.layers if able else ():
            layer.write_only = wanted
        return able

    def rewind(self, lo: int, hi: int, start: int) -> None:
        """Forget, in blocks [lo, hi), everything from position ``start`` on."""
        self.start = start
        for layer in self._layers_of(range(lo, min(hi, len(self.model.blocks)))):
            if isinstance(layer, GrowingLayer):
                assert layer.length >= start, "a layer is asked to skip positions"
                layer.length = start
            elif isinstance(layer, LinearAttentionLayer):
                _rewind_convolution(layer, start)

    def _layers_of(self, blocks: Iterable[int]) -> list[Any]:
        """What these blocks write; of a looped model a block may write several layers."""
        slots = self.model.slots
        return [self.layers[slot] for block in blocks for slot in ((block,) if slots is None else slots[block])]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.start

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int) -> tuple[int, int]:
        rows = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.start + rows, 0


def _is_dummy(layer: Any) -> bool:
    return type(layer).__name__ == "DummyLayer"


def _rewind_convolution(layer: Any, start: int) -> None:
    """Short convolutions keep their whole input history (``activate_past_recording``), so going back is a cut."""
    for i, history in layer.conv_states.items():
        if history is None or not layer.has_previous_state[i]:
            continue
        if start == 0:
            layer.has_previous_state[i] = False
        else:
            layer.conv_states[i] = history[..., :start]
