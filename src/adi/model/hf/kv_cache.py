"""KV memory whose layers may hold different numbers of positions, as transformers' own attention modules expect it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from adi.model.backbone import KVCache, States
from adi.model.hf.held import Held, RecordedLayer, after_first_pass
from adi.model.hf.passes import Written

REACHED = 64  # newest rows of which is kept what they were at each depth where passes stopped


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of all positions so far, in a buffer that doubles; going back is a smaller ``length``.

    Sliding-window layers keep everything too: the mask hides what lies outside the window, and any rollback stays
    possible. So do layers that keep an indexer's keys beside them.
    """

    def __init__(self, sliding: bool) -> None:
        super().__init__()
        self.is_sliding = sliding
        self.length = 0
        self.write_only = False
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.indexer_keys: Tensor | None = None
        self.indexer_length = 0
        self.indexer_position_ids: Tensor | None = None  # noted by a model's own forward, whichever blocks run

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

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """The indexer's keys so far, ``[1, T, D]``, these among them."""
        start, self.indexer_length = self.indexer_length, self.indexer_length + indexer_key_states.shape[-2]
        self.indexer_keys = _room(self.indexer_keys, indexer_key_states, start, self.indexer_length)
        self.indexer_keys[..., start : self.indexer_length, :] = indexer_key_states
        return self.indexer_keys[..., : self.indexer_length, :]

    def cut(self, length: int) -> None:
        """Forget all from this position on."""
        assert self.length >= length or self.keys is None, "a layer is asked to skip positions"
        self.length, self.indexer_length = min(self.length, length), min(self.indexer_length, length)

    def get_seq_length(self) -> int:
        return self.length

    def piece(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """A copy of these positions."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[..., start:end, :].clone(), self.values[..., start:end, :].clone()

    def fill(self, pieces: Sequence[tuple[Tensor, Tensor]], length: int) -> None:
        """Hold the first ``length`` positions of these, and nothing else."""
        keys, values = zip(*pieces, strict=True)
        self.keys, self.values = torch.cat(keys, -2)[..., :length, :], torch.cat(values, -2)[..., :length, :]
        self.length, self.is_initialized = length, True


class GrowingHybrid(RecordedLayer, GrowingLayer):
    """Keys and values beside a linear layer's state, which is held."""

    def __init__(self, states: int, sliding: bool) -> None:
        GrowingLayer.__init__(self, sliding)
        LinearAttentionLayer.__init__(self, number_of_states=states)


APART = frozenset(vars(GrowingLayer(sliding=False)))


def _room(buffer: Tensor | None, new: Tensor, used: int, needed: int) -> Tensor:
    if buffer is not None and buffer.shape[-2] >= needed:
        return buffer
    *lead, _, width = new.shape
    grown = new.new_empty((*lead, max(64, 1 << (needed - 1).bit_length()), width))
    if buffer is not None:
        grown[..., :used, :] = buffer[..., :used, :]
    return grown


def _of_ours(layer: Any) -> Any:
    """A layer of our own for one of transformers', where it can be told what that keeps."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or type(layer).__name__ == "DynamicIndexedLayer":
        return GrowingLayer(sliding=layer.is_sliding)
    if type(layer) is LinearAttentionLayer:
        return RecordedLayer(number_of_states=layer.number_of_states)
    if type(layer).__name__ in ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"):
        return GrowingHybrid(layer.number_of_states, layer.is_sliding)
    return layer


class KVPart(KVCache):
    """Keys and values of some positions in each layer that has some. ``stamp`` tells the weights' values at the time."""

    def __init__(self, model: Any, layers: list[tuple[Tensor, Tensor] | None]) -> None:
        self.model, self.layers, self.stamp = model, layers, model.stamp()

    @property
    def bytes(self) -> int:
        return sum(piece.nbytes for layer in self.layers if layer is not None for piece in layer)

    def close(self) -> None:
        """Free the copies."""
        self.layers.clear()


class StaircaseCache(KVCache, DynamicCache):  # type: ignore[misc]
    """A cache that is given where the next rows start instead of deriving it from its first layer.

    While blocks ``[lo, hi)`` run, every one of them holds exactly ``start`` positions, so lengths and mask sizes have
    one answer for all layers. ``held`` are the layers that cannot be cut; where there are any, ``text`` are the tokens so far,
    and ``reached`` what the newest of them were at depths where passes stopped, with the position of the first.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(config=model.config)
        self.model = model  # that its sequence began with
        self.far = None if model.far is None else StaircaseCache(model.far)  # of a text past the edge of its rotary angles
        self.edge, self.ids = model.edge, list[int]()
        self.start = 0
        self.layers: list[Any] = [_of_ours(layer) for layer in self.layers]
        for layer in self.layers:
            if isinstance(layer, RecordedLayer):
                layer.activate_past_recording()
        kept = [(i, layer) for i, layer in enumerate(self.layers) if type(layer) is not GrowingLayer and not _is_dummy(layer)]
        self.held = {i: Held(layer, APART if isinstance(layer, GrowingLayer) else frozenset()) for i, layer in kept}
        self.text: list[int] = []
        self.reached: dict[int, tuple[int, States]] = {}
        self.running: list[int] = []  # slots of the blocks of this pass
        self.make_room(max((slot for slots in model.slots or () for slot in slots), default=0))

    def make_room(self, slot: int) -> None:
        """Have a layer of this number: a looped model may write more of them than its configuration says."""
        while self.model.loop is not None and len(self.layers) <= slot:
            self.layers.append(GrowingLayer(sliding=False))

    def part(self, start: int, end: int) -> KVPart | None:
        """A copy of positions [start, end); None where a layer keeps more than keys and values by position."""
        if self.far is not None or self.held or any(getattr(layer, "indexer_length", 0) for layer in self.layers):
            return None
        grown = [layer if isinstance(layer, GrowingLayer) and layer.keys is not None else None for layer in self.layers]
        return KVPart(self.model, [None if layer is None else layer.piece(start, end) for layer in grown])

    def resume(self, parts: Sequence[KVPart], length: int) -> bool:
        """Begin with copies of these parts; False where the model has changed since they were made."""
        if any(part.model is not self.model or part.stamp != parts[-1].stamp for part in parts):
            return False
        if parts[-1].stamp != self.model.stamp():
            return False
        self.make_room(len(parts[0].layers) - 1)
        for layer, *pieces in zip(self.layers, *(part.layers for part in parts), strict=True):
            if pieces[0] is not None:
                layer.fill(pieces, length)
        return True

    def _copy(self) -> StaircaseCache:
        made = copy.copy(self)
        made.layers, made.held = copy.deepcopy((self.layers, self.held))
        made.text, made.reached = list(self.text), dict(self.reached)
        return made

    def close(self) -> None:
        """Free keys and values of all blocks."""
        self.layers.clear()
        self.held.clear()
        self.reached.clear()
        if self.far is not None:
            self.far.close()

    def peek(self, block: int, length: int) -> Tensor | None:
        """Keys and values of the first ``length`` positions in one block, where it has that many."""
        if self.far is not None and length > self.edge:
            return self.far.peek(block, length)
        layer = next(iter(self.written_by([block])), None) if block < len(self.model.blocks) else None
        if not isinstance(layer, GrowingLayer) or layer.keys is None or layer.values is None or layer.length < length:
            return None
        if layer.keys.shape != layer.values.shape:
            return torch.cat([part[..., :length, :].flatten() for part in (layer.keys, layer.values)])
        return torch.stack([layer.keys[..., :length, :], layer.values[..., :length, :]])

    def write_only(self, wanted: bool) -> bool:
        """Whether blocks are to be left once their keys and values are written; False where some layer cannot do that."""
        single = self.model.slots is None or all(len(slots) == 1 for slots in self.model.slots)
        able = single and all(type(layer) is GrowingLayer for layer in self.layers)
        for layer in self.layers if able else ():
            layer.write_only = wanted
        return able

    def rewind(self, lo: int, hi: int, start: int) -> None:
        """Forget, in blocks [lo, hi), everything from position ``start`` on."""
        self.start, self.running = start, self._slots_of(range(lo, min(hi, len(self.model.blocks))))
        for slot in self.running:
            if slot in self.held:
                self.held[slot].go(start)
            if isinstance(layer := self.layers[slot], GrowingLayer):
                layer.cut(start)
        for layer in self.layers:  # a model's own forward notes them on a layer, whichever blocks run
            if getattr(layer, "indexer_position_ids", None) is not None:
                layer.indexer_position_ids = layer.indexer_position_ids[..., :start]

    def written_by(self, blocks: Iterable[int]) -> list[Any]:
        """What these blocks write; of a looped model a block may write several layers."""
        return [self.layers[slot] for slot in self._slots_of(blocks)]

    def _slots_of(self, blocks: Iterable[int]) -> list[int]:
        slots = self.model.slots
        return [slot for block in blocks for slot in ((block,) if slots is None else slots[block])]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.start

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int) -> tuple[int, int]:
        rows = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        for slot in self.running if layer_idx in self.held else ():
            layer = self.layers[slot]
            if type(layer) is type(self.layers[layer_idx]) and not isinstance(layer, GrowingLayer | LinearAttentionLayer):
                return layer.get_mask_sizes(rows)  # type: ignore[no-any-return]  # it forgets by itself
        return self.start + rows, 0

    def nearest(self, lo: int, hi: int, start: int) -> int:
        """The last position up to ``start`` at which all that blocks [lo, hi) hold can be put; what is kept of later ones is
        of other tokens, and dropped."""
        held = [self.held[slot] for slot in self._slots_of(range(lo, hi)) if slot in self.held]
        for one in held:
            one.forget(0, start + 1)
        places = {start}.union(*(one.positions() for one in held))
        return max(at for at in places if at <= start and all(one.can(at) for one in held))

    def settle(self, lo: int, hi: int, start: int, states: States) -> None:
        """Blocks [lo, hi) have run these rows, which belong to the text from ``start`` on; all before it is final where they
        reach the last block."""
        end = self.start + len(states)
        for slot in self.running:
            if slot in self.held:
                self.held[slot].settle(end)
                self.held[slot] = after_first_pass(self.held[slot])
        last = hi == len(self.model.blocks)
        for one in self.held.values() if last else ():
            one.forget(max(at for at in one.positions() if at <= start), end)
        self.reached = {d: _until(run, self.start) if lo < d <= hi else run for d, run in self.reached.items()}
        if not last:
            first, before = self.reached.get(hi, (self.start, None))
            joined = states if before is None or first + len(before) < self.start else States.joined([before, states])
            self.reached[hi] = end - min(len(joined), REACHED), joined[-REACHED:]

    def keys_and_values(self, block: int, length: int) -> tuple[Tensor, Tensor]:
        """What this block wrote of the first ``length`` positions."""
        (layer,) = self.written_by([block])
        return layer.keys[..., :length, :], layer.values[..., :length, :]

    def keep(self, block: int, position: int) -> None:
        """This block's layers stand at ``position``, part of the way through a pass: be able to come back there."""
        for slot in self._slots_of([block]):
            if slot in self.held:
                self.held[slot].settle(position, keep=True)

    def below(self, block: int) -> StaircaseCache:
        """A copy of what blocks below this one hold, to work something out beside the text."""
        made = self._copy()
        made.layers = [layer if i in self._slots_of(range(block)) else None for i, layer in enumerate(made.layers)]
        return made

    @property
    def bytes(self) -> int:
        """What keys, values and snapshots take."""
        grown = [layer for layer in self.layers if isinstance(layer, GrowingLayer)]
        tensors = [t for layer in grown for t in (layer.keys, layer.values, layer.indexer_keys) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors) + sum(one.bytes for one in self.held.values())


def _until(run: tuple[int, States], end: int) -> tuple[int, States]:
    return run[0], run[1][: max(0, end - run[0])]


def _is_dummy(layer: Any) -> bool:
    return type(layer).__name__ == "DummyLayer"
