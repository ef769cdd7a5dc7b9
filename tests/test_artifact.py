"""Exits on disk: they come back as they were, belong to one model, and refuse everything damaged or foreign."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adi
from adi.artifact import SHIPPED, _digest
from conftest import random_exits
from families import tiny


@pytest.fixture
def saved(llama: adi.Model, tmp_path: Path) -> Path:
    random_exits(llama, (2, 4), adi.Threshold("entropy", {2: 3.0, 4: 4.0})).save(tmp_path / "exits")
    return tmp_path / "exits"


def test_what_was_saved_comes_back(llama: adi.Model, saved: Path) -> None:
    first, again = random_exits(llama, (2, 4), adi.Threshold("entropy", {2: 3.0, 4: 4.0})), adi.load_exits(saved)
    assert (again.base, again.depths, again.trigger, again.report) == (first.base, first.depths, first.trigger, first.report)
    assert again.heads is not None
    assert first.heads is not None
    assert again.heads.ids_S.tolist() == first.heads.ids_S.tolist()
    for depth in first.depths:
        for name, tensor in first.heads.adapters[depth].tensors().items():
            assert torch.equal(again.heads.adapters[depth].tensors()[name], tensor)
    assert sorted(p.name for p in saved.iterdir()) == ["exits.json", "exits.safetensors"]


def test_saving_leaves_other_files_alone(llama: adi.Model, saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    random_exits(llama, (3,), adi.Never()).save(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert adi.load_exits(saved).depths == (3,)


def test_exits_of_another_model_are_refused(saved: Path) -> None:
    other = adi.load(tiny("qwen3"))
    with pytest.raises(ValueError, match=r"belong to .*Llama.*not to .*Qwen3.*adi tune"):
        adi.generate(other, [1, 2], adi.Verified(adi.load_exits(saved)))


def test_an_unknown_name_says_what_is_shipped() -> None:
    with pytest.raises(ValueError, match=r"'nowhere'.*smollm2-135m.*adi tune"):
        adi.load_exits("nowhere")


def test_bare_exits_say_which_depths_are_possible(llama: adi.Model) -> None:
    for depths in ((), (0,), (6,), (2, 9)):
        with pytest.raises(ValueError, match="choose among 1, 2, 3, 4, 5"):
            adi.bare_exits(llama, depths)
    with pytest.raises(ValueError, match="nothing to save"):
        adi.bare_exits(llama, (2,)).save("anywhere")


def _edit(folder: Path, **changes: Any) -> None:
    value = json.loads((folder / "exits.json").read_text())
    (folder / "exits.json").write_text(json.dumps({**value, **changes}))


JSON_DAMAGE: dict[str, dict[str, Any]] = {
    "another format": {"format": 4},
    "a format with certificates, and none": {"format": 3},
    "a field too many": {"code": "import os"},
    "depths out of order": {"depths": [4, 2]},
    "depths beyond the model": {"depths": [2, 6]},
    "depths of another kind": {"depths": ["2"]},
    "a depth without tensors": {"depths": [2, 3, 4]},
    "a tensor without depth": {"depths": [2]},
    "another width": {"width": 33},
    "a smaller vocabulary": {"vocabulary": 20},
    "no layers": {"layers": 0},
    "a trigger of no kind": {"trigger": {"kind": "hope"}},
    "a nameless base": {"base": 5},
    "a report that is none": {"report": []},
}


@pytest.mark.parametrize("damage", list(JSON_DAMAGE))
def test_damaged_json_is_refused(saved: Path, damage: str) -> None:
    _edit(saved, **JSON_DAMAGE[damage])
    with pytest.raises(ValueError, match=r"exits"):
        adi.load_exits(saved)


def test_missing_and_broken_files_are_refused(saved: Path) -> None:
    (saved / "exits.json").write_text("{")
    with pytest.raises(ValueError, match=r"exits\.json is damaged"):
        adi.load_exits(saved)
    (saved / "exits.json").unlink()
    with pytest.raises(ValueError, match="cannot read the exits file"):
        adi.load_exits(saved)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_truncated_tensors_are_refused(saved: Path, cut: int) -> None:
    path = saved / "exits.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="digest differs"):
        adi.load_exits(saved)
    _edit(saved, tensors=_digest(path))
    with pytest.raises(ValueError, match="damaged"):
        adi.load_exits(saved)


@pytest.mark.parametrize("name", ["2.gain_D", "ids_S", "4.tail_bias"])
def test_wrong_tensors_are_refused(saved: Path, name: str) -> None:
    path = saved / "exits.safetensors"
    whole = load_file(path)
    nan = {**whole, name: whole[name].float() * float("nan")}
    for tensors in (
        {k: v for k, v in whole.items() if k != name},
        {**whole, name: whole[name][:0]},
        nan,
        {**whole, "x": nan[name]},
    ):
        save_file(tensors, path)
        _edit(saved, tensors=_digest(path))
        with pytest.raises(ValueError, match="damaged"):
            adi.load_exits(saved)


def test_shipped_exits_load_without_their_model() -> None:
    exits = adi.load_exits("smollm2-135m")
    assert exits.layers == 30
    assert exits.report["depths"]
    assert exits.made_by["command"].startswith("adi tune smollm2-135m")
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file()) < 30e6
