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
    assert sorted(b.number for cache in caches for b in cache.blocks) == list(range(1, BLOCKS + 1)), "the first is nobody's"
    assert pool.free == 0
    with pytest.raises(MemoryFullError):
        pool.reserve([(PagedCache(pool), 1)])


class Interrupted(list[Any]):
    """Free blocks, of which one is taken and then there is an interruption."""

    def pop(self, *args: Any) -> Any:
        super().pop(*args)
        raise KeyboardInterrupt


def test_blocks_are_not_lost_when_taking_them_is_interrupted(pool: KVPool) -> None:
    kept, other = PagedCache(pool), PagedCache(pool)
    pool.reserve([(kept, 32 * 10)])
    mine = [block.number for block in kept.blocks]
    plain = pool._free
    pool._free = Interrupted(plain)
    with pytest.raises(KeyboardInterrupt):
        pool.reserve([(other, 32)])
    plain[:] = pool._free
    pool._free = plain
    with pytest.raises(MemoryFullError):
        pool.reserve([(other, 32 * 41)])
    pool.reserve([(other, 32 * 40)])
    assert [block.number for block in kept.blocks] == mine
    assert sorted([*mine, *(block.number for block in other.blocks)]) == list(range(1, BLOCKS + 1))


def test_a_sequence_that_is_forgotten_gives_its_blocks_back(pool: KVPool) -> None:
    for _ in range(3):
        pool.reserve([(PagedCache(pool), 32 * BLOCKS)])
        gc.collect()
        assert pool.free == BLOCKS


def test_a_block_is_free_when_the_last_who_held_it_has_let_go(pool: KVPool) -> None:
    first, second = PagedCache(pool), PagedCache(pool)
    pool.reserve([(first, 70)])
    part = pool.part(first, 32, 70)
    assert [b.number for b in part.blocks] == [b.number for b in first.blocks[1:]]
    assert part.shared
    assert first.shared
    pool.resume(second, [pool.part(first, 0, 32), part], 40)
    assert second.blocks[0] is first.blocks[0]
    assert second.blocks[1] is not first.blocks[1], "it will write there"
    assert pool.used == 4
    first.close()
    assert (pool.used, part.shared) == (4, False)
    part.close()
    assert pool.used == 2
    second.close()
    assert pool.free == BLOCKS


class Keeping:
    """Holds the blocks of some texts that ended."""

    def __init__(self, caches: list[PagedCache]) -> None:
        self.caches = caches

    def idle(self) -> int:
        return sum(not cache.shared for cache in self.caches)

    def evict(self) -> bool:
        if (lone := next((cache for cache in self.caches if not cache.shared), None)) is None:
            return False
        self.caches.remove(lone)
        lone.close()
        return True


def test_blocks_that_are_only_kept_make_room(pool: KVPool) -> None:
    caches = [PagedCache(pool) for _ in range(BLOCKS)]
    for cache in caches:
        pool.reserve([(cache, 32)])
    used, keeping = pool.part(caches[3], 0, 32), Keeping(caches)
    pool.keepers.add(keeping)
    other = PagedCache(pool)
    assert pool.fits([(other, 32 * (BLOCKS - 1))])
    assert not pool.fits([(other, 32 * BLOCKS)])
    pool.reserve([(other, 32 * 10)])
    assert len(keeping.caches) == BLOCKS - 10
    with pytest.raises(MemoryFullError):
        pool.reserve([(other, 32 * BLOCKS)])
    assert keeping.caches[0].blocks == used.blocks
