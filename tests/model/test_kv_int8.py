"""Keys and values in 8 bits on the compiled engine: the same laws as with float memory, in less of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adi

pytest.importorskip("openvino")

from adi.errors import ModelError, UsageError
from adi.model.backbone import Rows
from adi.model.load import Model
from adi.model.openvino import OpenVinoBackbone, export_and_open
from adi.model.openvino.row_invariance import rows_are_invariant
from adi.risk.certificate import Certificate
from engines import IDS, PROMPT, Cached, engine, model_of, prefilled


@pytest.fixture(scope="module")
def small() -> OpenVinoBackbone:
    return export_and_open(model_of("llama"), name="llama", precision="int8", kv_precision="int8")


def test_a_rows_bits_depend_on_nothing_beside_it(small: OpenVinoBackbone) -> None:
    """Found on loading, of rows and of a prompt's parts, their KV memory included."""
    assert (small.spec.row_invariant, small.spec.chunk) == (True, 1)
    assert rows_are_invariant(small)
    assert small.spec.numbers == "int8 with KV memory in int8"
    model = Model(small, None, frozenset())
    assert adi.generate(model, [5, 6], adi.FullDepth(), max_new_tokens=1).precision == small.spec.numbers


def test_memory_is_codes_with_a_scale_for_each_position_and_head(small: OpenVinoBackbone, made: Cached) -> None:
    wide = engine(made, "llama", "int8")
    attention = small._manifest.attentions[0]
    codes = attention.kv_heads * (attention.key_width + attention.value_width + 16)
    assert small.pool.block_bytes == 32 * codes * len(small._manifest.attentions)
    for block in range(small.spec.layers):
        got, wanted = (one.peek(prefilled(one, IDS[:PROMPT]), block, PROMPT) for one in (small, wide))
        torch.testing.assert_close(got, wanted, atol=0.05 * float(wanted.abs().max()), rtol=0)


def test_rolled_back_positions_leave_nothing_behind(small: OpenVinoBackbone) -> None:
    """A position has a scale of its own: what was written behind it and rolled back moves nothing."""
    layers = small.spec.layers
    plain, tried = prefilled(small, IDS[:PROMPT]), prefilled(small, IDS[:PROMPT])
    small.forward([Rows(tried, PROMPT, IDS[50:56], None)], 0, layers)
    for i in range(PROMPT, PROMPT + 3):
        wanted, got = (small.forward([Rows(c, i, IDS[i : i + 1], None)], 0, layers)[0].hidden_TD for c in (plain, tried))
        assert torch.equal(got, wanted)


def test_verified_is_full_depth_and_reused_is_computed(small: OpenVinoBackbone) -> None:
    model = Model(small, None, frozenset())
    ids = (*IDS[:PROMPT], *IDS[:PROMPT])
    full = adi.generate(model, ids, adi.FullDepth(), max_new_tokens=40)
    with adi.PrefixCache(model) as kept:
        found = [adi.generate(model, ids, adi.Lookup(), max_new_tokens=40, prefix_cache=kept) for _ in range(2)]
    batch = adi.generate_batch(model, [ids, IDS[:20]], adi.Lookup(), max_new_tokens=40)
    assert found[1].counters.reused
    assert [text.token_ids for text in (*found, batch[0])] == [full.token_ids] * 3


def test_a_certificate_holds_for_the_memory_that_it_was_made_with(small: OpenVinoBackbone, made: Cached) -> None:
    wide = engine(made, "llama", "int8")
    made_with: dict[Any, Certificate] = {}
    for one in (small, wide):
        model, prompts = Model(one, None, frozenset()), [IDS[i : i + 9] for i in range(20)]
        (made_with[one],) = adi.calibrate(model, adi.bare_exits(model, (2, 4)), prompts, [0.5], max_new_tokens=3).certificates
        made_with[one].check(one.spec)
    with pytest.raises(ModelError, match=r"holds for the precision int8, and this .* --precision int8 --kv-precision int8 "):
        made_with[wide].check(small.spec)
    with pytest.raises(
        ModelError, match=r"holds for the precision int8 with KV memory in int8, and this .* --precision int8 --"
    ):
        made_with[small].check(wide.spec)


@pytest.mark.parametrize("options", [{"backend": "hf"}, {"precision": "bf16"}])
def test_transformers_modules_have_no_such_memory(tiny_folder: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"kv_precision 'int8' needs the openvino engine"):
        adi.load(tiny_folder, kv_precision="int8", **options)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match=r"kv_precision 'int4' is not known; choose one of auto, int8\."):
        adi.load("smollm2-135m", kv_precision="int4")
