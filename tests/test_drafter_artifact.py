"""Drafters in exits on disk: they come back, and what is damaged is refused; they belong to one model."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adi
from adi.artifact import _digest
from adi.drafters.network import shapes
from adi.model.backbone import States
from conftest import exits_with_drafter, random_exits
from families import VOCABULARY, tiny


@pytest.fixture
def saved(llama: adi.Model, tmp_path: Path) -> Path:
    exits_with_drafter(llama).save(tmp_path / "exits")
    return tmp_path / "exits"


def test_a_drafter_comes_back_from_disk_in_half_precision(llama: adi.Model, tmp_path: Path) -> None:
    fine = exits_with_drafter(llama)
    assert fine.drafter is not None
    rough = replace(
        fine, drafter=fine.drafter.map(lambda weight: weight + 1e-5), report={"drafter": {"acceptance": {"9": 0.9}}}
    )
    rough.save(tmp_path)
    again = adi.load_exits(tmp_path)
    assert again.drafter is not None
    assert rough.drafter is not None
    for name, tensor in rough.drafter.tensors().items():
        wanted = tensor if name == "ids_S" else tensor.half().float()
        assert torch.equal(again.drafter.tensors()[name], wanted)
    assert again.acceptance == {9: 0.9}
    mine, theirs = again.drafting(llama.backbone), fine.drafting(llama.backbone)
    assert mine is not None
    assert theirs is not None
    deep = States(torch.randn(1, llama.backbone.spec.width, generator=torch.Generator().manual_seed(5)))
    assert mine.step([7], mine.start(deep))[0][0].token == theirs.step([7], theirs.start(deep))[0][0].token


def test_a_folder_without_drafter_and_one_of_format_1_load(llama: adi.Model, tmp_path: Path) -> None:
    random_exits(llama, (2, 4), adi.Never()).save(tmp_path)
    value = json.loads((tmp_path / "exits.json").read_text())
    for number in (2, 1):
        (tmp_path / "exits.json").write_text(json.dumps({**value, "format": number}))
        exits = adi.load_exits(tmp_path)
        assert exits.drafter is None
        assert exits.drafting(llama.backbone) is None
        assert exits.acceptance == {}


DRAFTER = {"ids_S", *shapes(1, 1)}


@pytest.mark.parametrize("name", sorted(DRAFTER))
def test_damaged_drafters_are_refused(saved: Path, name: str) -> None:
    path, key = saved / "exits.safetensors", f"drafter.{name}"
    whole = load_file(path)
    nan, infinite = (whole[key].float() * number for number in (float("nan"), float("inf")))
    bad: list[dict[str, torch.Tensor]] = [
        {k: v for k, v in whole.items() if k != key},
        {**whole, key: whole[key][:0]},
        {**whole, key: torch.cat([whole[key], whole[key]])},
        {**whole, key: whole[key][None].contiguous()},
        {**whole, key: nan},
        {**whole, key: infinite},
        {**whole, "drafter.more": nan},
    ]
    if name == "ids_S":
        bad += [{**whole, key: torch.where(whole[key] == whole[key][3], i, whole[key])} for i in (-1, VOCABULARY)]
    for tensors in bad:
        save_file(tensors, path)
        value = json.loads((saved / "exits.json").read_text())
        (saved / "exits.json").write_text(json.dumps({**value, "tensors": _digest(path)}))
        with pytest.raises(ValueError, match=r"damaged: .*(drafter|shortlist)"):
            adi.load_exits(saved)


def test_a_drafter_belongs_to_its_model_and_does_not_keep_it_alive(llama: adi.Model) -> None:
    exits = exits_with_drafter(llama)
    assert exits.drafting(llama.backbone) is exits.drafting(llama.backbone), "made once"
    other = adi.load(tiny("qwen3"))
    with pytest.raises(ValueError, match="belong to"):
        exits.drafting(other.backbone)
    twin = adi.load(tiny("llama"))
    assert adi.generate(twin, [1, 2, 3], adi.Verified(exits), max_new_tokens=6).token_ids
    alive = weakref.ref(twin.backbone)
    del twin
    gc.collect()
    assert alive() is None
