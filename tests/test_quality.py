"""What fewer bits cost, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adi.cli.app import app
from adi.measure.quality import compare, quality

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


def test_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "quality.json"
    text.write_text(TEXT)
    done = CliRunner().invoke(
        app, ["quality", str(tiny_folder), "--precision", "int8", "--text", str(text), "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "int8" in done.output
    assert json.loads(out.read_text())["precisions"][0]["precision"] == "int8"
    for wrong, said in ((["--tokens", "1"], "at least 2"), (["--precision", "int3"], "int3")):
        done = CliRunner().invoke(app, ["quality", str(tiny_folder), *wrong])
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())
