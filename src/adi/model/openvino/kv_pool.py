"""KV memory in blocks of 32 positions, shared by all sequences and all segments of one model."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from adi.errors import MemoryFullError
from adi.model.backbone import KVCache
from adi.model.openvino.graph import BLOCK_TOKENS

FIRST_BLOCKS = 16
SPARE = 0


class PagedCache(KVCache):
    """One sequence's blocks, in the order of its positions. They go back to the pool when it is closed or forgotten."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.blocks: list[int] = []
        pool.own(self)
        self._close = weakref.finalize(self, pool.give_back, self.blocks)

    def close(self) -> None:
        """Give the blocks back; the cache is empty then, and not to be used again."""
        self._close()


class KVPool:
    """Blocks by number, in one tensor for each block's keys and values; it doubles on demand up to ``budget_bytes``.

    One more, ``SPARE``, is nobody's: rows that count for nothing write there.

    ``version`` changes when the tensors do. ``block_bytes`` is what 32 positions of one sequence take, in all layers.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.tensors: dict[str, Any] = {}
        self.version = 0
        self.block_bytes = 0
        self.blocks = 0
        self._owners: dict[int, tuple[weakref.ref[PagedCache], list[int]]] = {}  # by the list's id
        self._free: list[int] = []
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
        """How many blocks sequences hold."""
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
        return sum(_missing(wanted).values()) <= self.free

    def reserve(self, wanted: Sequence[tuple[PagedCache, int]]) -> None:
        """See to it that each cache holds so many positions; MemoryFullError, with nothing changed, where the budget ends."""
        missing = _missing(wanted)
        total = sum(missing.values())
        if total > self.free:
            self._recount()
        if total > self.free:
            raise MemoryFullError(
                f"the KV memory of {self.budget_bytes / 2**20:.0f} MiB is full: {total} more blocks of {BLOCK_TOKENS} "
                f"positions are needed and {self.free} of {self.capacity} are free. Close other sequences or raise kv_bytes."
            )
        while total > len(self._free):
            self._grow()
        for cache, _ in wanted:
            rest = len(self._free) - missing.pop(id(cache), 0)
            taken, left = self._free[rest:][::-1], self._free[:rest]
            cache.blocks[len(cache.blocks) :], self._free = taken, left  # in one: an interruption must not come between

    def peek(self, cache: PagedCache, attention: int, turn: int, length: int) -> Any:
        """A copy of what one attention of the model holds, in one turn, of the first ``length`` positions, as a flat float32
        torch tensor; None where the plugin's layout does not go position by position."""
        import numpy as np
        import torch

        found = []
        for name in (f"key_cache.{attention}", f"value_cache.{attention}"):
            if name not in self.tensors or self._ports[name][1][1] != BLOCK_TOKENS:
                return None
            pages = self._by_block(name)[cache.blocks, turn].astype(np.float32)  # [blocks, heads, 32, size]
            rows = pages.transpose(0, 2, 1, 3).reshape(-1, pages.shape[1] * pages.shape[3])
            found.append(rows[:length].ravel())
        return torch.from_numpy(np.concatenate(found))

    def fork(self, cache: PagedCache, length: int) -> PagedCache:
        """Another sequence with the same first ``length`` positions; MemoryFullError where there are no blocks for them."""
        made = PagedCache(self)
        self.reserve([(made, length)])
        for name in self.tensors:
            self._by_block(name)[made.blocks] = self._by_block(name)[cache.blocks[: len(made.blocks)]]
        return made

    def _by_block(self, name: str) -> Any:
        """The memory itself, ``[blocks, turns, heads, ...]``."""
        data, (_, shape, turns) = self.tensors[name].data, self._ports[name]
        return data.reshape(-1, turns, *shape)

    def give_back(self, blocks: list[int]) -> None:
        """Take blocks back from a sequence that has ended."""
        self._free.extend(blocks)
        blocks.clear()
        self._owners.pop(id(blocks), None)

    def own(self, cache: PagedCache) -> None:
        """Know of a sequence, so that its blocks can be found when it is gone."""
        self._owners[id(cache.blocks)] = weakref.ref(cache), cache.blocks

    def _recount(self) -> None:
        """Free is what no living sequence holds: an interruption may have come while blocks were given back.

        Only ``reserve`` may ask for it, or it would run beside one. Lists of the dead are emptied, so that one whose turn to be
        given back is still to come gives nothing twice.
        """
        owners = list(self._owners.items())
        held = {block for _, (cache, blocks) in owners if cache() is not None for block in blocks}
        for key, (cache, blocks) in owners:
            if cache() is None:
                blocks.clear()
                self._owners.pop(key, None)
        self._free = [block for block in range(self.blocks, SPARE, -1) if block not in held]

    def begin(self) -> None:
        """See to it that there are tensors at all, the spare block at least."""
        if not self.version:
            self._grow()

    def _grow(self) -> None:
        import openvino as ov

        size = min(self.capacity, max(FIRST_BLOCKS, 2 * self.blocks))
        used = self.blocks + 1 if self.blocks else 0  # numbers begin after the spare one
        tensors: dict[str, Any] = {}
        for name, (kind, shape, turns) in self._ports.items():
            tensors[name] = ov.Tensor(kind, ov.Shape([(size + 1) * turns, *shape]))
            tensors[name].data[used * turns :] = (
                0  # attention multiplies what lies beyond a text by zero, which must not be NaN
            )
            if used:
                tensors[name].data[: used * turns] = self.tensors[name].data
        free = [*self._free, *range(size, self.blocks, -1)]
        self.tensors, self._free, self.blocks, self.version = tensors, free, size, self.version + 1


def _missing(wanted: Sequence[tuple[PagedCache, int]]) -> dict[int, int]:
    """How many blocks each cache, by its ``id``, lacks."""
    return {id(cache): max(0, _blocks(tokens) - len(cache.blocks)) for cache, tokens in wanted}


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _bytes(kind: Any, shape: Sequence[int]) -> int:
    size = int(kind.size)
    for length in shape:
        size *= length
    return size
