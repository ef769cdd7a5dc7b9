"""Reports by kind of prompt: who belongs where, and that the parts are those of the whole."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

import adi
from adi.cli.tune import by_category
from adi.exits.heads import shortlist
from adi.training.answers import Answer, is_held_out
from adi.training.categories import OTHER, Categories, Tally
from adi.training.drafter_shards import read_drafter_shard, write_drafter_shards
from adi.training.train_drafter import judge
from conftest import random_drafter
from support import embedding

KNOWN = Categories({(5, 6): "code", (7,): "math"})
ANSWERS = [
    Answer("a", (5, 6, 1, 2, 3), 2, True, True),
    Answer("b", (7, 1, 1), 1, True, True),
    Answer("c", (5, 6, 4), 2, True, True),
    Answer("d", (9, 9, 9, 2), 3, True, True),
]


def test_a_text_is_of_its_prompts_category() -> None:
    assert [KNOWN.named(answer) for answer in ANSWERS] == ["code", "math", "code", OTHER]
    spoken = {"write code": "code", "add up": "math"}
    assert Categories.of(spoken, lambda text: [len(text)]).known == {(10,): "code", (6,): "math"}


def test_positions_of_a_shard_are_of_their_sequences_category(sharp: adi.Model, tmp_path: Path) -> None:
    (path,) = write_drafter_shards(sharp.backbone, ANSWERS, tmp_path, lambda done, total: None)
    names, kind_N = KNOWN.numbered(read_drafter_shard(path))
    assert [names[place] for place in kind_N.tolist()] == ["code"] * 5 + ["math"] * 3 + ["code"] * 3 + [OTHER] * 4


def test_the_parts_are_those_of_the_whole(sharp: adi.Model, tmp_path: Path) -> None:
    net, readout = random_drafter(sharp), sharp.backbone.readout()
    among, embed = shortlist(readout, net.ids_S), embedding(sharp)
    shards = write_drafter_shards(sharp.backbone, ANSWERS, tmp_path, lambda done, total: None)
    whole = judge(net, readout, among, embed, shards, KNOWN)
    parts = whole["by_category"]
    assert set(parts) == {"code", "math", OTHER}
    positions = 4 + 2 + 2 + 2  # all but those a text begins with
    assert sum(part["positions"] for part in parts.values()) == whole["positions"] == positions
    hits = sum(part["agreement_by_step"][0] * part["positions"] for part in parts.values())
    assert hits == pytest.approx(whole["agreement_by_step"][0] * whole["positions"])
    for kind, numbers in (("code", (0, 2)), ("math", (1,)), (OTHER, (3,))):
        alone = write_drafter_shards(sharp.backbone, [ANSWERS[n] for n in numbers], tmp_path / kind, lambda done, total: None)
        apart = judge(net, readout, among, embed, alone)
        assert "by_category" not in apart, "nothing is known of prompts"
        assert {name: apart[name] for name in parts[kind]} == parts[kind]


def test_a_tally_counts() -> None:
    tally = Tally(2)
    tally.add(["a", "b"], torch.tensor([0, 0, 1, 0]), 1, torch.tensor([True, False, True, True]))
    tally.add(["a", "b"], torch.tensor([0, 0]), 2, torch.tensor([True, False]))
    tally.add(["b"], torch.tensor([0]), 1, torch.tensor([False]))
    assert tally.by_category() == {
        "a": {"agreement_by_step": [2 / 3, 1 / 2], "accepted_in_a_row": 1.0, "positions": 3},
        "b": {"agreement_by_step": [1 / 2, 0.0], "accepted_in_a_row": 0.5, "positions": 2},
    }
    assert tally.total() == {"agreement_by_step": [3 / 5, 1 / 2], "accepted_in_a_row": 4 / 5, "positions": 5}
    assert Tally(1).total() == {"agreement_by_step": [0.0], "accepted_in_a_row": 0.0, "positions": 0}


def test_exits_and_drafter_are_told_by_category(tiny_model: adi.Model, tmp_path: Path) -> None:
    prompts = [f"the dog number {i}" for i in range(60)]
    held = [prompt for prompt in prompts if is_held_out(prompt)]
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
