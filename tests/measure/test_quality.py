"""What fewer bits cost, on a tiny model."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from adi.cli.app import app
from adi.measure.quality import compare, quality, windows_of
from adi.model.backbone import Rows
from adi.model.hf import HfBackbone
from adi.model.tokenizer import Tokenizer

pytest.importorskip("openvino")
TEXT = "the quick brown fox jumps over the lazy dog and then the dog sleeps; 12 plus 30 is 42. " * 8


def test_float32_costs_nothing_and_fewer_bits_cost_more(tiny_folder: Path) -> None:
    found = quality(str(tiny_folder), ["fp32", "int8", "int4"], text=TEXT, tokens=300)
    fp32, int8, int4 = found["precisions"]
    assert found["tokens"] > 100
    assert fp32["ratio"] == pytest.approx(1, abs=1e-4)
    assert fp32["divergence"] == pytest.approx(0, abs=1e-5)
    assert fp32["same_token"] == 1
    assert 1e-5 < int8["divergence"] < int4["divergence"]
    assert all(row["row_invariant"] for row in found["precisions"])


def test_a_model_agrees_with_itself(tiny_model: Any) -> None:
    same = compare(tiny_model.backbone, tiny_model.backbone, [range(5, 60), range(9, 12)])
    assert (same.ratio, same.divergence, same.same_token) == (1, 0, 1)


def test_many_rows_are_read_as_one_pass_over_them_reads_them(tiny_model: Any) -> None:
    ids = tuple(range(5, 60))
    other = HfBackbone(rounded(tiny_model.backbone.model))
    a_TV, b_TV = (logits(backbone, ids).log_softmax(-1) for backbone in (other, tiny_model.backbone))
    losses = [-float(logs_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean()) for logs_TV in (a_TV, b_TV)]
    found = compare(other, tiny_model.backbone, [ids], rows=9)
    assert found.perplexity == pytest.approx(math.exp(losses[0]), rel=1e-5)
    assert found.ratio == pytest.approx(math.exp(losses[0] - losses[1]), rel=1e-5)
    worse_N = (b_TV - a_TV)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).double()
    error = math.exp(float(worse_N.mean())) * float(worse_N.std(correction=0)) / math.sqrt(len(worse_N))
    assert found.ratio_error == pytest.approx(error, rel=1e-4)
    assert found.divergence == pytest.approx(float((b_TV.exp() * (b_TV - a_TV)).sum(-1).mean()), rel=1e-3)
    assert 0 < found.same_token == int((a_TV.argmax(-1) == b_TV.argmax(-1)).sum()) / len(ids)


def rounded(model: Any) -> Any:
    """A copy with coarse weights."""
    coarse = copy.deepcopy(model)
    with torch.no_grad():
        for weight in coarse.parameters():
            weight.copy_((weight * 100).round() / 100)
    return coarse


def logits(backbone: Any, ids: tuple[int, ...]) -> torch.Tensor:
    (states,) = backbone.forward([Rows(backbone.new_cache(), 0, ids, None)], 0, backbone.spec.layers)
    return backbone.logits(states.hidden_TD)  # type: ignore[no-any-return]


def test_every_window_begins_as_texts_do(tiny_tokenizer: Any) -> None:
    plain = Tokenizer(tiny_tokenizer)
    ids = plain.encode(TEXT * 4)
    windows = windows_of(plain, TEXT * 4, 1000)
    assert [token for window in windows for token in window] == list(ids[:1000])
    begun = copy.deepcopy(tiny_tokenizer)
    begun.backend_tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 1)])
    windows = windows_of(Tokenizer(begun), TEXT * 4, 1000)
    assert [token for window in windows for token in window[1:]] == list(ids[:998])
    assert {window[0] for window in windows} == {1}
    assert [len(window) for window in windows] == [512, 488]


def test_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "quality.json"
    text.write_text(TEXT)
    done = CliRunner().invoke(
        app, ["quality", str(tiny_folder), "--precision", "int8", "--text", str(text), "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "int8" in done.output
    assert json.loads(out.read_text())["precisions"][0]["precision"] == "int8"
    for wrong, complaint in ((["--tokens", "1"], "greater than or equal to 2"), (["--precision", "int3"], "int3")):
        done = CliRunner().invoke(app, ["quality", str(tiny_folder), *wrong])
        assert done.exit_code == 2
        assert complaint in " ".join(done.output.split())
