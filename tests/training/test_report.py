"""Reports: thresholds that keep their promise, categories of prompts, and that the parts are those of the whole."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

import adi
from adi.cli.training.tune import by_category
from adi.decoding.teacher_forcing import KnownText
from adi.exits.heads import shortlist
from adi.training.report import judge_drafter, loosest_threshold
from adi.training.shards import Teacher, read_shard, write_forced_shards
from adi.training.texts import OTHER, Categories, is_held_out
from conftest import random_drafter

KNOWN = Categories({(5, 6): "code", (7,): "math"})
TEXTS = [KnownText((5, 6, 1, 2, 3), 1), KnownText((7, 1, 1), 0), KnownText((5, 6, 4), 1), KnownText((9, 9, 9, 2), 2)]


def test_a_text_is_of_its_prompts_category(sharp: adi.Model, tmp_path: Path) -> None:
    assert [KNOWN.of_text(text) for text in TEXTS] == ["code", "math", "code", OTHER]
    by_length = {"write code": "code", "add up": "math"}
    assert Categories.of(by_length, lambda text: [len(text)]).known == {(10,): "code", (6,): "math"}
    (path,) = write_forced_shards(sharp.backbone, TEXTS, tmp_path)
    assert read_shard(path).texts == TEXTS


def test_the_parts_are_those_of_the_whole(sharp: adi.Model, tmp_path: Path) -> None:
    net, readout = random_drafter(sharp), sharp.backbone.readout()
    teacher, embed = Teacher(readout, shortlist(readout, net.ids_S)), sharp.backbone.embed
    shards = write_forced_shards(sharp.backbone, TEXTS, tmp_path / "all")
    whole = judge_drafter(net, teacher, embed, shards, KNOWN)
    parts = whole["by_category"]
    assert set(parts) == {"code", "math", OTHER}
    positions = 4 + 2 + 2 + 2  # all but those a text begins with
    assert sum(part["positions"] for part in parts.values()) == whole["positions"] == positions
    hits = sum(part["agreement_by_step"][0] * part["positions"] for part in parts.values())
    assert hits == pytest.approx(whole["agreement_by_step"][0] * whole["positions"])
    for kind, numbers in (("code", (0, 2)), ("math", (1,)), (OTHER, (3,))):
        alone = write_forced_shards(sharp.backbone, [TEXTS[n] for n in numbers], tmp_path / kind)
        apart = judge_drafter(net, teacher, embed, alone)
        assert "by_category" not in apart, "nothing is known of prompts"
        assert {name: apart[name] for name in parts[kind]} == parts[kind]


def test_exits_and_drafter_are_reported_by_category(tiny_model: adi.Model, tmp_path: Path) -> None:
    prompts = [f"the dog number {i}" for i in range(60)]
    held = [prompt for prompt in prompts if is_held_out(tiny_model.encode(prompt))]
    categories = dict.fromkeys(prompts, "dogs") | dict.fromkeys(held[1:], "foxes")
    options = adi.TuneOptions(depths=(2, 4), tokens=600, max_new_tokens=8, shortlist=40, rank=4, epochs=1, drafter_epochs=1)
    report = adi.tune(tiny_model, tmp_path, [prompts], options, categories=categories).report
    for row in report["depths"]:
        assert set(row["by_category"]) == {"dogs", "foxes"}
        assert min(row["by_category"].values()) - 1e-4 <= row["agreement"] <= max(row["by_category"].values()) + 1e-4
    assert set(report["drafter"]["by_category"]) == {"dogs", "foxes"}
    tables = by_category(report)
    assert [[column.header for column in table.columns][1:] for table in tables] == [
        ["tokens", "1", "2", "3", "4", "5", "in a row"],
        ["2", "4"],
    ]
    shown = io.StringIO()
    Console(file=shown, width=80).print(*tables)
    assert shown.getvalue().count("dogs") == shown.getvalue().count("foxes") == 2
    assert "\u2026" not in shown.getvalue(), "nothing is cut off"
    assert by_category({"depths": [{"depth": 2}], "drafter": {}}) == [], "exits made before"


def test_the_loosest_threshold_keeps_its_promise() -> None:
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(4000, generator=generator) * 3
    right = torch.rand(4000, generator=generator) < (1 - entropy / 3)
    threshold = loosest_threshold(entropy, right, 4000, 0.85)
    assert threshold is not None
    fired = entropy <= threshold + 1e-4
    assert right[fired].float().mean() >= 0.849
    assert loosest_threshold(entropy, torch.zeros(4000, dtype=torch.bool), 4000, 0.85) is None
    assert loosest_threshold(entropy[:20], torch.ones(20, dtype=torch.bool), 4000) is None, "too rare to look for"
