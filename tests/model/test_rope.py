"""Rotary angles that depend on how long the text is: exact below, above and over the edge, or refused there in a sentence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import adi
from adi.model.backbone import Rows
from families import FAMILIES, tiny

EDGE, TOKENS = 32, 20
LONG = dict(rope_type="longrope", rope_theta=1e4, factor=8.0, original_max_position_embeddings=EDGE)
FACTORS = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4)
PROMPTS = {
    length: torch.randint(3, 127, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (8, 28, 31, 32, 33, 60)
}


def made(kind: str = "phi3", rope: dict[str, Any] | None = None, **more: Any) -> Any:
    name, settings = FAMILIES[kind]
    rope = {**LONG, **FACTORS} if rope is None else rope
    config = getattr(t, f"{name}Config")(**{**settings, "max_position_embeddings": 256, "rope_parameters": rope, **more})
    torch.manual_seed(1)
    model = getattr(t, f"{name}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def own(model: Any, ids: list[int]) -> tuple[int, ...]:
    return tuple(model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist())


def policies(model: adi.Model) -> list[adi.Policy]:
    bare = adi.bare_exits(model, (2, 4))
    ragged = adi.AnyOf((adi.Threshold("stability", 0.6), adi.Threshold("top_probability", {4: 0.0})))
    return [adi.FullDepth(), adi.Verified(bare, adi.Always((2,)), 4), adi.Verified(bare, ragged, 3), adi.Lookup()]


# A2
@pytest.mark.parametrize("length", list(PROMPTS))
def test_a_text_that_crosses_to_other_rotary_angles_is_transformers_own(length: int) -> None:
    hf = made(original_max_position_embeddings=EDGE)
    model, ids = adi.load(hf), PROMPTS[length]
    wanted = own(hf, ids)
    for policy in policies(model):
        assert adi.generate(model, ids, policy, max_new_tokens=TOKENS).token_ids == wanted


# A2
def test_a_batch_crosses_as_each_text_does_alone() -> None:
    hf = made(original_max_position_embeddings=EDGE)
    model = adi.load(hf)
    texts = adi.generate_batch(model, list(PROMPTS.values()), policies(model)[1], max_new_tokens=TOKENS)
    assert [text.token_ids for text in texts] == [own(hf, ids) for ids in PROMPTS.values()]


# A2
def test_drafts_that_are_taken_back_at_the_edge_leave_no_trace() -> None:
    hf = made(original_max_position_embeddings=EDGE)
    backbone = adi.load(hf).backbone
    ids, layers = (*PROMPTS[28], *PROMPTS[8]), backbone.spec.layers
    cache = backbone.new_cache()
    backbone.forward([Rows(cache, 0, ids[:28], None)], 0, layers)
    wrong = tuple((i + 1) % 128 for i in ids[28:])
    backbone.forward([Rows(cache, 28, wrong, None)], 0, layers)
    early = backbone.forward([Rows(cache, 28, ids[28:], None)], 0, 2)[0]
    (states,) = backbone.forward([Rows(cache, 28, ids[28:], early)], 2, layers, mlp=True)
    with torch.no_grad():
        short, far = (hf(torch.tensor([ids[:n]])).logits[0] for n in (EDGE, len(ids)))
    wanted = torch.cat([short[28:], far[EDGE:]])
    torch.testing.assert_close(backbone.logits(states), wanted, atol=1e-4, rtol=0)
    assert states.mlp_TF is not None
    assert len(states.mlp_TF) == len(states.before_TD) == len(ids) - 28


# A2
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_crossing_that_transformers_does_not_read_again_is_refused_there(kind: str) -> None:
    """Its own generate would mix keys of both angles: how it says a text would depend on how it was cut into passes."""
    hf = made(kind)
    model = adi.load(hf)
    for length in (8, 33, 60):  # wholly below, wholly above
        ids = PROMPTS[length]
        for policy in policies(model):
            assert adi.generate(model, ids, policy, max_new_tokens=TOKENS).token_ids == own(hf, ids)
    for policy in policies(model):
        with pytest.raises(ValueError, match="other rotary angles for texts of more than 32 tokens, and this text would cross"):
            adi.generate(model, PROMPTS[28], policy, max_new_tokens=TOKENS)


# A2
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_angles_that_grow_with_the_text_are_those_of_short_texts_within_the_context(kind: str) -> None:
    rope: Any = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
    if kind == "gemma3":
        rope = {"full_attention": rope, "sliding_attention": dict(rope_type="default", rope_theta=1e4)}
    hf = made(kind, rope, max_position_embeddings=64) if kind == "llama" else None
    if hf is None:
        config = t.Gemma3TextConfig(**{**FAMILIES[kind][1], "max_position_embeddings": 64, "rope_parameters": rope})
        hf = t.Gemma3ForCausalLM(config).eval()
        hf.generation_config.eos_token_id = None
    wanted = own(hf, PROMPTS[32])
    with torch.no_grad():
        hf(torch.randint(3, 99, (1, 90)))  # others use it past its context, and its tables grow
    model = adi.load(hf)
    for policy in policies(model):
        assert adi.generate(model, PROMPTS[32], policy, max_new_tokens=TOKENS).token_ids == wanted
    with pytest.raises(ValueError, match="64"):
        adi.generate(model, PROMPTS[60], max_new_tokens=TOKENS)


def test_other_models_have_no_edge() -> None:
    for family in ("llama", "gemma3", "gpt2", "gpt_oss"):
        backbone: Any = adi.load(tiny(family)).backbone
        assert backbone._split.edge is None


# A2
def test_why_such_a_model_runs_on_the_slower_engine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("ADI_CACHE", str(tmp_path / "cache"))
    made(original_max_position_embeddings=EDGE).save_pretrained(tmp_path / "model")
    notices: list[str] = []
    assert adi.load(tmp_path / "model", notice=notices.append).backbone.spec.backend == "hf"
    assert any("its longrope rotary angles depend on how long the text is" in notice for notice in notices)


def test_rotary_modules_that_are_called_in_a_way_of_their_own_are_left_alone() -> None:
    hf = copy.deepcopy(tiny("llama"))

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(4), persistent=False)

        def forward(self, x: Any, position_ids: Any, needed: Any) -> Any:
            raise AssertionError

    hf.model.layers[1].extra = Own()
    backbone: Any = adi.load(hf).backbone
    assert backbone._split.edge is None
