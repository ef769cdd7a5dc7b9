"""Blocks that compute in bfloat16 on the compiled engine: the same laws as in float32, from the same export."""

from __future__ import annotations

import pytest
import torch

import adi

pytest.importorskip("openvino")

import openvino as ov

from adi.errors import UsageError
from adi.model.backbone import Rows
from adi.model.load import Model
from adi.model.openvino import OpenVinoBackbone, export_and_open
from adi.model.openvino.row_invariance import rows_are_invariant
from engines import IDS, PROMPT, Cached, engine, model_of, prefilled


@pytest.fixture(scope="module", params=["auto", "int8"])
def half(request: pytest.FixtureRequest) -> OpenVinoBackbone:
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    return export_and_open(model_of("llama"), name="llama", precision="int8-bf16", kv_precision=request.param)


def test_a_rows_bits_depend_on_nothing_beside_it(half: OpenVinoBackbone) -> None:
    """Found on loading, of rows and of a prompt's parts, their KV memory included; and noted apart from float32's."""
    assert half.spec.precision == "int8-bf16"
    assert (half.spec.row_invariant, half.spec.chunk) == (True, 1)
    assert rows_are_invariant(half)


def test_blocks_are_near_float32s_and_the_head_is_its(half: OpenVinoBackbone, made: Cached) -> None:
    wide = engine(made, "llama", "int8")
    assert half.spec.fingerprint == wide.spec.fingerprint
    (got,), (wanted,) = (one.forward([Rows(one.new_cache(), 0, IDS, None)], 0, one.spec.layers) for one in (half, wide))
    largest = float(wanted.hidden_TD.abs().max())
    torch.testing.assert_close(got.hidden_TD, wanted.hidden_TD, atol=0.1 * largest, rtol=0)
    assert not torch.equal(got.hidden_TD, wanted.hidden_TD)
    assert torch.equal(half.logits(wanted), wide.logits(wanted))
    for block in range(half.spec.layers):
        kept, full = (one.peek(prefilled(one, IDS[:PROMPT]), block, PROMPT) for one in (half, wide))
        torch.testing.assert_close(kept, full, atol=0.1 * float(full.abs().max()), rtol=0)


def test_verified_is_full_depth_and_reused_is_computed(half: OpenVinoBackbone) -> None:
    model, ids = Model(half, None, frozenset()), (*IDS[:PROMPT], *IDS[:PROMPT])
    full = adi.generate(model, ids, adi.FullDepth(), max_new_tokens=40)
    with adi.PrefixCache(model) as kept:
        found = [adi.generate(model, ids, adi.Lookup(), max_new_tokens=40, prefix_cache=kept) for _ in range(2)]
    exits = adi.bare_exits(model, (2, 4))
    drafted = adi.generate(model, ids, adi.Verified(exits), max_new_tokens=40)
    batch = adi.generate_batch(model, [ids, IDS[:20]], adi.Lookup(), max_new_tokens=40)
    assert found[1].counters.reused
    assert [text.token_ids for text in (*found, drafted, batch[0])] == [full.token_ids] * 4


def test_a_processor_without_it_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ov.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(UsageError, match=r"'int8-bf16' needs a processor with bfloat16, .* has FP32, INT8; take 'int8'\."):
        export_and_open(model_of("llama"), name="llama", precision="int8-bf16")


def test_weights_in_32_bits_are_not_meant_with_it() -> None:
    with pytest.raises(UsageError, match=r"precision 'fp32-bf16' is not known; choose one of auto, fp32, int8, int4"):
        adi.load("smollm2-135m", precision="fp32-bf16")
