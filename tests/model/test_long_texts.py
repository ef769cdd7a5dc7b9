"""A text of more than 8,000 tokens on the compiled engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as t

pytest.importorskip("openvino")

from adi.model.backbone import Rows
from adi.model.hf import HfBackbone
from adi.model.openvino import OpenVinoBackbone, export_and_open

LENGTH, STEPS = 8_200, 4


def test_a_text_of_eight_thousand_tokens(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt, then single steps: the states of transformers' modules, and all KV memory comes back."""
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    config = t.LlamaConfig(**size, num_hidden_layers=2, max_position_embeddings=LENGTH + STEPS)
    model = t.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    mine, theirs = export_and_open(model, name="long", precision="fp32"), HfBackbone(model)
    assert mine.spec.context == LENGTH + STEPS
    ids = tuple(torch.randint(0, 64, (LENGTH + STEPS,)).tolist())
    caches, free = (mine.new_cache(), theirs.new_cache()), mine.pool.free
    for start, end in ((0, LENGTH), *((i, i + 1) for i in range(LENGTH, LENGTH + STEPS))):
        got, wanted = (
            engine.forward([Rows(cache, start, ids[start:end], None)], 0, 2)[0].hidden_TD
            for engine, cache in zip((mine, theirs), caches, strict=True)
        )
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.logits(got[-8:]), theirs.logits(wanted[-8:]), atol=1e-4, rtol=1e-4)
        assert mine.greedy(got[-8:]) == theirs.greedy(wanted[-8:])
    assert free - mine.pool.free == -(-(LENGTH + STEPS) // 32)
    caches[0].close()
    assert mine.pool.free == free
    first_pass = (_read(mine, ids[:LENGTH], LENGTH), _read(mine, ids[:LENGTH], 1000), _read(mine, ids[:LENGTH]))
    assert mine.spec.chunk > 1 or all(torch.equal(first_pass[0], part) for part in first_pass[1:])


def _read(engine: OpenVinoBackbone, ids: tuple[int, ...], rows: int | None = None) -> torch.Tensor:
    """States of a prompt that is read in passes of so many rows, by default as the engine wants it."""
    parts, start = [], 0
    with engine.new_cache() as cache:
        while start < len(ids):
            end = min(start + rows, len(ids)) if rows else engine.spec.prompt_pass(start, len(ids))
            parts.append(engine.forward([Rows(cache, start, ids[start:end], None, True)], 0, 2)[0].hidden_TD)
            start = end
    return torch.cat(parts)


def test_a_wide_models_prompt_goes_in_fewer_rows_a_pass() -> None:
    """As many as a bounded memory holds; none is left over alone."""
    config = t.LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    spec = HfBackbone(t.LlamaForCausalLM(config).eval()).spec
    free = {width: replace(spec, chunk=1, width=width) for width in (64, 576, 1024, 2048, 4096, 16384)}
    assert [one.prompt_rows for one in free.values()] == [2048, 2048, 1024, 512, 256, 256]
    assert free[576].prompt_pass(0, 2049) == 2047
    assert free[576].prompt_pass(2047, 2049) == 2049
