"""How the rows of a pass are laid out for attention, and that arrays keep their shapes while a text grows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("openvino")

from adi.model.backbone import Rows
from adi.model.openvino.graph import BLOCK_TOKENS
from adi.model.openvino.inputs import BLOCKS_AT_ONCE, ROWS_APART, Layout, PassInputs
from adi.model.openvino.kv_pool import KVBlock

REQUEST = st.tuples(st.integers(0, 200), st.integers(1, ROWS_APART + 6))


def rows_of(requests: list[tuple[int, int]]) -> list[Rows]:
    """Requests of (start, count), each over blocks of its own."""
    made = []
    for i, (start, count) in enumerate(requests):
        blocks = [KVBlock(1000 * (i + 1) + n) for n in range(-(-(start + count) // BLOCK_TOKENS))]
        kept = SimpleNamespace(blocks=blocks, numbers=[block.number for block in blocks])
        made.append(Rows(kept, start, tuple(range(count)), None))
    return made


@given(st.lists(REQUEST, min_size=1, max_size=4), st.integers(1, 4))
def test_every_row_is_attended_over_its_own_blocks_as_far_as_it_goes(requests: list[tuple[int, int]], threads: int) -> None:
    rows = rows_of(requests)
    layout = Layout.of(rows, threads)
    feed = PassInputs(*layout.key, width=2)
    feed.fill(rows, layout)
    a = {name: array.tolist() for name, array in feed.arrays.items()}
    seen = []
    for j, past in enumerate(a["past_lens"]):
        count = a["subsequence_begins"][j + 1] - a["subsequence_begins"][j]
        blocks = a["block_indices"][a["block_indices_begins"][j] : a["block_indices_begins"][j + 1]]
        if not count:
            assert (past, blocks) == (0, []), "an empty sequence holds nothing"
            continue
        assert len(blocks) == -(-(past + count) // BLOCK_TOKENS)
        seen += [(past + n, blocks) for n in range(count)]
    wanted = [(r.start + n, r) for r in rows for n in range(len(r.ids))]
    assert [place for place, _ in seen] == [place for place, _ in wanted] == a["position_ids"][0]
    assert all(
        blocks == [b.number for b in r.cache.blocks[: len(blocks)]] for (_, blocks), (_, r) in zip(seen, wanted, strict=True)
    )
    assert a["max_context_len"] == max(place for place, _ in wanted) + 1
    assert len(a["past_lens"]) >= threads


def test_the_list_of_blocks_has_room_for_a_multiple() -> None:
    keys = {Layout.of(rows_of([(start, 1)]), 2).key for start in range(BLOCKS_AT_ONCE * BLOCK_TOKENS)}
    assert keys == {(1, 2, BLOCKS_AT_ONCE)}, "one set of arrays for all of them"
    assert Layout.of(rows_of([(BLOCKS_AT_ONCE * BLOCK_TOKENS, 1)]), 2).key == (1, 2, 2 * BLOCKS_AT_ONCE)
    assert Layout.of(rows_of([(0, ROWS_APART)]), 2).sequences == ROWS_APART
    assert Layout.of(rows_of([(0, ROWS_APART + 1)]), 2).sequences == 2, "a prompt is attended as a whole"
