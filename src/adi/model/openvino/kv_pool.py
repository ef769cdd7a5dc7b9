"""KV memory in blocks of 32 positions, shared by all sequences and all segments of one model."""

from __future__ import annotations

import sys
import weakref
from array import array
from collections.abc import Sequence
from typing import Any

from adi.errors import MemoryFullError
from adi.model.backbone import Keeper, KVCache
from adi.model.openvino.graph import BLOCK_TOKENS

FIRST_BLOCKS = 16
SPARE = 0
PARAMETERS = 8  # bytes of scale and zero point


class KVBlock:
    """A block of KV memory, by its number. It is free again when nobody holds it any more."""

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number


class _Place(weakref.ref[KVBlock]):
    """Where a number's block is: dead while the block is free."""

    number = SPARE  # until it has one: an interruption may come before


class PagedCache(KVCache):
    """One sequence's blocks, in the order of its positions. Others may hold some of them too, but write to none of these."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.blocks: list[KVBlock] = []  # which only grows, until it is cleared for good
        self._numbers = array("i")

    @property
    def bytes(self) -> int:
        return len(self.blocks) * self.pool.block_bytes

    @property
    def numbers(self) -> array[int]:
        """The blocks' numbers, for a pass: of those that are new since the last one, so that no pass goes through all."""
        known = self._numbers
        if len(known) < len(self.blocks):
            known.extend(block.number for block in self.blocks[len(known) :])
        return known

    @property
    def shared(self) -> bool:
        return any(_holders(self.blocks, i) > ALONE for i in range(len(self.blocks)))

    def close(self) -> None:
        """Let go of the blocks; the cache is empty then, and not to be used again."""
        del self._numbers[:]
        self.blocks.clear()


def _holders(blocks: list[KVBlock], i: int) -> int:
    """CPython's count of who refers to a block, a few temporary ones included."""
    return sys.getrefcount(blocks[i])


ALONE = _holders([KVBlock(SPARE)], 0)


class KVPool:
    """Blocks by number, in one tensor for each block's keys and values; it grows by a quarter on demand up to ``budget_bytes``.

    One more, ``spare``, is nobody's: rows that count for nothing write there. Who holds a block is Python's business: no count
    of ours can be left wrong by an interruption, or by a sequence that is forgotten. ``keepers`` hold blocks of texts that
    ended, and let go of them when they are wanted.

    ``version`` changes when the tensors do. ``block_bytes`` is what 32 positions of one sequence take, in all layers.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.tensors: dict[str, Any] = {}
        self.version = 0
        self.block_bytes = 0
        self.blocks = 0
        self.spare = KVBlock(SPARE)
        self.keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()
        self._places: dict[int, _Place] = {}
        self._free: list[_Place] = []
        self._ports: dict[str, tuple[Any, list[int], int]] = {}

    @property
    def capacity(self) -> int:
        """How many blocks the budget allows."""
        return self.budget_bytes // max(1, self.block_bytes)

    @property
    def free(self) -> int:
        """How many blocks can still be had."""
        return self.capacity - self.blocks + len(self._free)

    @property
    def used(self) -> int:
        """How many blocks somebody holds."""
        return self.blocks - len(self._free)

    def add(self, name: str, port: Any, turns: int = 1) -> None:
        """Room for one compiled input ``key_cache.i`` or ``value_cache.i``, whose type and shape the plugin has chosen.

        Pieces that share a block of the model share its memory. A block that runs so many ``turns`` has room for each of them,
        a sequence's block b in turn t at ``b * turns + t``.
        """
        if name in self._ports:
            return
        kind, shape = port.get_element_type(), [size.get_length() for size in list(port.get_partial_shape())[1:]]
        self._ports[name] = (kind, shape, turns)
        self.block_bytes += turns * _bytes(kind, shape)
        if self.blocks:
            import openvino as ov

            self.tensors[name] = ov.Tensor(kind, ov.Shape([(self.blocks + 1) * turns, *shape]))
            self.tensors[name].data[:] = 0
            self.version += 1

    def fits(self, wanted: Sequence[tuple[PagedCache, int]]) -> bool:
        """Whether ``reserve`` would succeed."""
        missing = _missing(wanted)
        return missing <= self.free or missing <= self.free + sum(keeper.idle() for keeper in self.keepers)

    def reserve(self, wanted: Sequence[tuple[PagedCache, int]]) -> None:
        """See to it that each cache holds so many positions; MemoryFullError, with nothing changed, where the budget ends."""
        missing = _missing(wanted)
        if missing > self.free:
            self._recount()
        while missing > self.free and any(keeper.evict() for keeper in self.keepers):
            pass
        if missing > self.free:
            raise MemoryFullError(
                f"the KV memory of {self.budget_bytes / 2**20:.0f} MiB is full: {missing} more blocks of {BLOCK_TOKENS} "
                f"positions are needed and {self.free} of {self.capacity} are free. Close other sequences or raise kv_bytes."
            )
        while missing > len(self._free):
            self._grow()
        for cache, tokens in wanted:
            cache.blocks += [self._take() for _ in range(_blocks(tokens) - len(cache.blocks))]

    def peek(self, cache: PagedCache, attention: int, turn: int, length: int) -> Any:
        """A copy of what one attention of the model holds, in one turn, of the first ``length`` positions, as a flat float32
        torch tensor; None where the plugin's layout does not go position by position."""
        import numpy as np
        import torch

        found = []
        for name in (f"key_cache.{attention}", f"value_cache.{attention}"):
            if name not in self.tensors or self._ports[name][1][1] != BLOCK_TOKENS:
                return None
            numbers = [block.number for block in cache.blocks]
            pages = _numbers(self._by_block(name)[numbers, turn], self._ports[name][0])  # [blocks, heads, 32, size]
            rows = pages.transpose(0, 2, 1, 3).reshape(-1, pages.shape[1] * pages.shape[3])
            found.append(rows[:length].ravel())
        return torch.from_numpy(np.concatenate(found))

    def part(self, cache: PagedCache, start: int, end: int) -> PagedCache:
        """The blocks of positions [start, end), held by one more."""
        made = PagedCache(self)
        made.blocks += cache.blocks[start // BLOCK_TOKENS : _blocks(end)]
        return made

    def resume(self, cache: PagedCache, parts: Sequence[PagedCache], length: int) -> None:
        """Let an empty cache begin with so many positions of these parts: their blocks, and a copy of the last one where it is
        not full, which is where the sequence will write. MemoryFullError where there is none for it."""
        whole = length // BLOCK_TOKENS
        held = [block for part in parts for block in part.blocks]
        if length % BLOCK_TOKENS:
            with PagedCache(self) as copy:
                self.reserve([(copy, 1)])
                for name in self.tensors:
                    memory = self._by_block(name)
                    memory[copy.blocks[0].number] = memory[held[whole].number]
                held[whole:] = copy.blocks
        cache.blocks += held[: _blocks(length)]

    def _by_block(self, name: str) -> Any:
        """The memory itself, ``[blocks, turns, heads, ...]``."""
        data, (_, shape, turns) = self.tensors[name].data, self._ports[name]
        return data.reshape(-1, turns, *shape)

    def _block(self, number: int) -> KVBlock:
        """A block of this number, which goes among the free ones when nobody holds it any more: by no code of ours, which could
        be interrupted."""
        block = KVBlock(number)
        place = _Place(block, self._free.append)
        place.number = number
        self._places[number] = place
        return block

    def _take(self) -> KVBlock:
        while True:
            if not self._free:
                self._recount()
            place = self._free.pop()
            if self._places.get(place.number) is place:  # and not one that a recount has found as well, or has no number
                return self._block(place.number)

    def _recount(self) -> None:
        """Free is what nobody holds: an interruption may have come while a block was taken, or memory grew."""
        for number in {*range(1, self.blocks + 1)} - {*self._places}:
            self._block(number)
        self._free[:] = [place for _, place in sorted(self._places.items(), reverse=True) if place() is None]

    def begin(self) -> None:
        """See to it that there are tensors at all, the spare block at least."""
        if not self.version:
            self._grow()

    def _grow(self) -> None:
        import openvino as ov

        size = min(self.capacity, FIRST_BLOCKS + self.blocks + self.blocks // 4)
        used = self.blocks + 1 if self.blocks else 0  # numbers begin after the spare one
        tensors: dict[str, Any] = {}
        for name, (kind, shape, turns) in self._ports.items():
            tensors[name] = ov.Tensor(kind, ov.Shape([(size + 1) * turns, *shape]))
            tensors[name].data[used * turns :] = (
                0  # attention multiplies what lies beyond a text by zero, which must not be NaN
            )
            if used:
                tensors[name].data[: used * turns] = self.tensors[name].data
        new = range(size, self.blocks, -1)
        self.tensors, self.blocks, self.version = tensors, size, self.version + 1
        for number in new:
            self._block(number)  # nobody holds it


def _numbers(pages: Any, kind: Any) -> Any:
    """Pages as float32. In 8 bits a position of a head is its scale, its zero point and its codes."""
    import numpy as np

    if kind.get_type_name() == "bf16":  # numpy has no such type, and is given the bits as another's
        return (pages.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if pages.dtype != np.uint8:
        return pages.astype(np.float32)
    scale, zero = np.moveaxis(pages[..., :PARAMETERS].copy().view(np.float32), -1, 0)[..., None]
    return (pages[..., PARAMETERS:] - zero) * scale


def _missing(wanted: Sequence[tuple[PagedCache, int]]) -> int:
    """How many blocks these caches lack."""
    return sum(max(0, _blocks(tokens) - len(cache.blocks)) for cache, tokens in wanted)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _bytes(kind: Any, shape: Sequence[int]) -> int:
    size = int(kind.size)
    for length in shape:
        size *= length
    return size
