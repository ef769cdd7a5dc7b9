"""KV memory in blocks: each is one sequence's, and none is lost, whenever an interruption comes."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from adi.errors import MemoryFullError

pytest.importorskip("openvino")

import openvino as ov

from adi.model.openvino.kv_pool import KVPool, PagedCache

BLOCKS = 50


class Port:
    def get_element_type(self) -> Any:
        return ov.Type.f32

    def get_partial_shape(self) -> Any:
        return ov.PartialShape([-1, 2, 32, 8])


@pytest.fixture
def pool() -> KVPool:
    made = KVPool(budget_bytes=BLOCKS * 2 * 32 * 8 * 4)
    made.add("key_cache.0", Port())
    return made


def test_a_pool_hands_out_every_block_once(pool: KVPool) -> None:
    caches = [PagedCache(pool) for _ in range(BLOCKS)]
    for cache in caches:
        pool.reserve([(cache, 32)])
    assert sorted(b for cache in caches for b in cache.blocks) == list(range(1, BLOCKS + 1)), "the first is nobody's"
    assert pool.free == 0
    with pytest.raises(MemoryFullError):
        pool.reserve([(PagedCache(pool), 1)])


class Interrupted(list[int]):
    """Free blocks that are interrupted before or after they take more."""

    after = False

    def extend(self, blocks: Any) -> None:
        if self.after:
            super().extend(blocks)
        raise KeyboardInterrupt


@pytest.mark.parametrize("after", [False, True])
def test_blocks_are_not_lost_when_giving_them_back_is_interrupted(pool: KVPool, after: bool) -> None:
    kept, lost = PagedCache(pool), PagedCache(pool)
    pool.reserve([(kept, 32 * 10), (lost, 32 * 30)])
    mine = list(kept.blocks)
    pool._free = Interrupted(pool._free)
    pool._free.after = after
    with pytest.raises(KeyboardInterrupt):
        lost.close()
    del lost
    gc.collect()
    pool._free = list(pool._free)
    other = PagedCache(pool)
    with pytest.raises(MemoryFullError):
        pool.reserve([(other, 32 * 41)])
    pool.reserve([(other, 32 * 40)])
    assert kept.blocks == mine
    assert sorted([*mine, *other.blocks]) == list(range(1, BLOCKS + 1))


def test_blocks_that_were_found_are_not_given_back_a_second_time(pool: KVPool) -> None:
    """Another thread may have ended a sequence whose turn to give its blocks back comes after they were found."""
    late = PagedCache(pool)
    pool.reserve([(late, 32 * 30)])
    blocks = late.blocks
    late._close.detach()
    del late
    gc.collect()
    other = PagedCache(pool)
    pool.reserve([(other, 32 * BLOCKS)])
    pool.give_back(blocks)
    assert pool.free == 0
    other.close()
    assert sorted(pool._free) == list(range(1, BLOCKS + 1))
    assert not pool._owners
