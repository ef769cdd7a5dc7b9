"""Smoothing: the same model in float32, with quieter channels where eight bits will have to do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from msgspec.structs import replace

pytest.importorskip("openvino")

import openvino as ov

from adi.model.backbone import Rows
from adi.model.hf.weights import fingerprint
from adi.model.openvino import export_and_open, manifest
from adi.model.openvino.engine import OpenVinoBackbone
from adi.model.openvino.export import smoothquant as module
from adi.model.openvino.export.smoothquant import MOST, scales, smooth
from engines import IDS, model_of


def gained(family: str) -> Any:
    """The family's tiny model with gains that differ: those of 1 are no part of the exported graph."""
    model = copy.deepcopy(model_of(family))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.rand_like(parameter)
    return model


def exported(model: Any, name: str) -> tuple[manifest.Manifest, Any, Any]:
    export_and_open(model, name=name, precision="fp32")
    folder = manifest.export_dir(manifest.key_of(model, fingerprint(model)), "fp32")
    return manifest.read_manifest(folder), *manifest.read_graphs(folder, ov.Core())


def gains(blocks: Any) -> list[Any]:
    return [gain.node.input_value(gain.port).get_node().data.copy() for gain in module._gains(blocks)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3", "olmo2", "gpt2", "gpt_neox"])
def test_a_smoothed_model_is_the_same_in_float32(family: str) -> None:
    model = gained(family)
    page, blocks, head = exported(model, family)
    found = list(module._gains(blocks))
    before = gains(blocks)
    smooth(blocks, page.attentions, [IDS, IDS[::-1]])
    after = [gain.node.input_value(gain.port).get_node().data for gain in found]
    if family in ("llama", "qwen2"):
        assert len(found) == 2 * page.layers
    assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    opened = OpenVinoBackbone(replace(page, precision="fp32"), blocks, head)
    (states,) = opened.forward([Rows(opened.new_cache(), 0, IDS, None)], 0, page.layers)
    with torch.no_grad():
        wanted_TV = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(opened.logits(states.hidden_TD), wanted_TV, atol=2e-4, rtol=1e-4)


def test_without_texts_nothing_changes() -> None:
    page, blocks, _ = exported(gained("llama"), "llama")
    wanted = gains(blocks)
    assert wanted
    smooth(blocks, page.attentions, [])
    assert all(np.array_equal(a, b) for a, b in zip(gains(blocks), wanted, strict=True))


def test_an_export_in_eight_bits_is_smoothed_and_nearer_to_float32_where_a_channel_is_loud(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And texts are cut to the model's context."""
    model = gained("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[3] *= 200
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
                matrix.weight[:, 3] /= 200
        wanted_TV = model(torch.tensor([IDS])).logits[0]
    texts, errors = [(*IDS, *IDS[::-1]) * 40], []
    assert len(texts[0]) > model.config.max_position_embeddings
    for samples in ((), texts):
        monkeypatch.setenv("ADI_CACHE", str(tmp_path / str(len(samples))))
        opened = export_and_open(model, name="loud", precision="int8", samples=samples)
        (states,) = opened.forward([Rows(opened.new_cache(), 0, IDS, None)], 0, opened.spec.layers)
        errors.append(float((opened.logits(states.hidden_TD) - wanted_TV).square().mean()))
    assert errors[1] < 0.7 * errors[0]


@given(arrays(np.float32, 8, elements=st.floats(0, 1e6, width=32)), arrays(np.float32, 8, elements=st.floats(0, 1e3, width=32)))
def test_scales_are_numbers_and_even_out_what_differs(loud_K: np.ndarray, heavy_K: np.ndarray) -> None:
    scale_K = scales(loud_K, heavy_K)
    assert scale_K.dtype == np.float32
    assert np.isfinite(scale_K).all()
    assert ((scale_K >= 0.99 / MOST) & (scale_K <= 1.01 * MOST)).all()


def test_a_loud_channel_becomes_quieter() -> None:
    loud_K, heavy_K = np.array([1, 1, 1, 16], np.float32), np.ones(4, np.float32)
    scale_K = scales(loud_K, heavy_K)
    assert (loud_K / scale_K).max() / (loud_K / scale_K).min() == pytest.approx(4)
    assert scale_K.prod() == pytest.approx(1, rel=1e-5)
