"""Memory that cannot be cut, on transformers' engine: snapshots, and rows that run again in front of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adi
from adi.model.backbone import Rows, States
from adi.model.hf import HfBackbone
from adi.model.hf.held import COLUMNS, KEPT, HeldColumns
from adi.model.hf.replay import Way
from families import IDS, own_logits, tiny

WAYS = {"qwen3_next": Way.FRONT, "falcon_h1": Way.FRONT, "mamba2": Way.FRONT, "jamba": Way.SINGLY}


def passes(backbone: HfBackbone) -> list[int]:
    """The rows of every pass from now on."""
    split, seen = backbone._split, list[int]()
    plain = split.decode

    def decode(run: Any, rows: Rows, **more: Any) -> None:
        seen.append(len(rows.ids))
        plain(run, rows, **more)

    split.decode = decode  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("family", list(WAYS))
def test_the_quickest_way_that_is_right_is_found(family: str) -> None:
    assert HfBackbone(tiny(family))._split.way is WAYS[family]


@pytest.mark.parametrize("way", [Way.FRONT, Way.APART])
def test_what_was_accepted_since_a_snapshot_runs_in_front_or_apart(way: Way) -> None:
    backbone, wanted = HfBackbone(tiny("qwen3_next")), own_logits(tiny("qwen3_next"), IDS)
    backbone._split.way = way
    cache, layers = backbone.new_cache(), backbone.spec.layers
    backbone.forward([Rows(cache, 0, IDS[:10], None)], 0, layers)

    def round_of(start: int, ids: tuple[int, ...]) -> torch.Tensor:
        ahead = [backbone.forward([Rows(cache, start + i, ids[i : i + 1], None)], 0, 3)[0] for i in range(len(ids))]
        (deep,) = backbone.forward([Rows(cache, start, ids, States.joined(ahead))], 3, layers)
        return backbone.logits(deep)

    round_of(10, (*IDS[10:12], 7, 8, 9))  # two of five stand
    rows = passes(backbone)
    torch.testing.assert_close(round_of(12, IDS[12:15]), wanted[12:15], atol=1e-4, rtol=0)
    assert rows == ([1, 1, 1, 5] if way is Way.FRONT else [1, 1, 1, 2, 3])
    torch.testing.assert_close(round_of(13, IDS[13:16]), wanted[13:16], atol=1e-4, rtol=0)
    assert rows[-1] == (4 if way is Way.FRONT else 3), "and one row the next time, not all since the last full agreement"


def test_where_nothing_is_kept_of_what_entered_a_block_it_is_worked_out() -> None:
    backbone, wanted = HfBackbone(tiny("qwen3_next")), own_logits(tiny("qwen3_next"), IDS)
    cache, layers = backbone.new_cache(), backbone.spec.layers
    backbone.forward([Rows(cache, 0, IDS[:8], None)], 0, layers)
    backbone.forward([Rows(cache, 8, (*IDS[8:11], 3, 4), None)], 0, layers)
    (shallow,) = backbone.forward([Rows(cache, 11, IDS[11:14], None)], 0, 2)
    cache.reached.clear()
    (deep,) = backbone.forward([Rows(cache, 11, IDS[11:14], shallow)], 2, layers)
    torch.testing.assert_close(backbone.logits(deep), wanted[11:14], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2"])
def test_snapshots_are_few_however_long_the_text(family: str) -> None:
    backbone = HfBackbone(tiny(family))
    cache, layers, sizes = backbone.new_cache(), backbone.spec.layers, []
    for start in range(0, 60, 3):
        backbone.forward([Rows(cache, start, IDS[:3], None)], 0, layers)
        sizes.append(cache.bytes)
        assert all(len(held.positions()) <= 3 for held in cache.held.values())
    assert sizes[-1] == sizes[1], "keys and values have room for 64 positions from the start"
    for i in range(60, 100):
        backbone.forward([Rows(cache, i, IDS[:1], None)], 0, 1)
    assert all(len(held.positions()) <= KEPT + 2 for held in cache.held.values())


def test_short_convolutions_keep_and_read_no_more_with_length() -> None:
    backbone = HfBackbone(tiny("lfm2"))
    cache, layers = backbone.new_cache(), backbone.spec.layers
    for start in range(0, 600, 20):
        backbone.forward([Rows(cache, start, IDS[:20], None)], 0, layers)
    held = [one for one in cache.held.values() if isinstance(one, HeldColumns)]
    widths = [one.layer.conv_states[0].shape[-1] for one in held]
    assert len(held) == 4
    assert max(widths) <= 2 * (COLUMNS + 3) + 20
    assert held[0].can(560)
    assert not held[0].can(300), "that is run again from the start"


def test_texts_of_one_prompt_take_over_what_is_held() -> None:
    model = adi.load(tiny("falcon_h1"))
    policy = adi.Verified(adi.bare_exits(model, (2, 4)), adi.Threshold("top_probability", 0.0), draft_tokens=3)
    (alone,) = adi.generate_batch(model, [IDS[:9]], policy, max_new_tokens=10)
    assert [one.token_ids for one in adi.generate(model, IDS[:9], policy, max_new_tokens=10, n=3)] == [alone.token_ids] * 3


def test_keys_and_values_cannot_be_made_up_where_more_is_kept() -> None:
    model = adi.load(tiny("mamba2"))
    assert not model.backbone.can_propagate
    assert adi.load(tiny("llama")).backbone.can_propagate
