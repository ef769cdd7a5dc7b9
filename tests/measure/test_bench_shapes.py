"""Models of real shapes with random weights, for what size costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from adi.cli.app import app
from adi.measure.bench import shapes
from families import KV, C


def test_a_shape_becomes_a_folder_once_with_the_same_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    tiny = {**C, "vocab_size": 49152, "tie_word_embeddings": True}
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)
    monkeypatch.setattr(shapes, "KV_HEADS", KV["num_key_value_heads"])
    folder = shapes.shaped("tiny")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert shapes.shaped("tiny") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.config.hidden_size == C["hidden_size"]
    assert model.generation_config.eos_token_id is None
    weight = model.get_input_embeddings().weight
    assert weight.dtype == torch.bfloat16
    assert float(weight.float().std()) == pytest.approx(shapes.SPREAD, rel=0.05)


def test_a_shape_that_there_is_not_is_a_sentence() -> None:
    result = CliRunner().invoke(app, ["bench", "--shape", "llama-7b"])
    assert result.exit_code == 2
