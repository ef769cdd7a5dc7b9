"""Depth against familiarity on a model as it is: what is planted is found, what is not there is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import adi_

import adi
from adi.errors import UsageError
from adi.measure.exposure.familiarity import REPEATS, familiarity, figures, settled


def test_depth_is_from_where_all_exits_agree_with_full_depth() -> None:
    same = np.array([[True, False, True, False], [True, True, False, False], [True, True, True, False]])
    assert settled(same, (2, 4, 6), 8).tolist() == [2, 4, 6, 8]


def _rows(texts: int, length: int, repeat: float, count_of: Any = None) -> tuple[list[tuple[int, ...]], list[dict[str, Any]]]:
    """Texts whose depth falls by ``repeat`` with each doubling of mentions, and by what ``count_of`` says of a place."""
    dice = np.random.default_rng(0)
    own = [tuple(int(i) for i in dice.integers(0, 500, length)) for _ in range(texts)]
    rows = []
    for times in (REPEATS, 1):
        for n in range(texts):
            mention = np.repeat(np.arange(1, times + 1), length)
            surprise = dice.exponential(size=times * length) / mention
            depth = 20 + surprise + repeat * np.log2(mention) + 0.5 * dice.normal(size=times * length)
            depth += 0 if count_of is None else count_of(n, np.tile(np.arange(length), times))
            parts = {"surprise": surprise, "entropy": dice.exponential(size=times * length)}
            rows.append({"depth": depth, "predicted": dice.integers(0, 500, times * length), **parts})
    return own, rows


def test_a_planted_effect_of_repetition_is_found_at_equal_surprise() -> None:
    found = figures(*_rows(12, 40, repeat=-1.0), past=())
    low, high = found["repetition"]["interval"]
    assert low < -1.0 < high < 0
    assert found["repetition"]["with_nothing_held_equal"] < found["repetition"]["slope"]
    assert max(map(abs, found["repetition"]["permuted"])) < 0.2
    assert found["own_order"]["interval"][0] < 0 < found["own_order"]["interval"][1]


def test_n_grams_are_counted_in_the_past_that_is_given() -> None:
    own, rows = _rows(12, 40, repeat=0.0, count_of=lambda n, place: np.where(place > 20, -2.0, 0.0))
    past = [ids[18:] for ids in own for _ in range(3)]
    found = figures(own, rows, past)
    assert found["count"]["interval"][1] < 0
    assert found["counted"]["tokens"] == 12 * 19
    assert figures(own, rows, ())["count"] is None  # no answer has an n-gram of another one


def test_a_tiny_model_is_measured(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"word {n} and {n * n}"}) + "\n" for n in range(6)))
    options = ("--prompts", prompts, "--limit", 6, "-n", 8, "--backend", "hf", "--json", tmp_path / "found.json")
    done = adi_("study", "familiarity", tiny_folder, *options)
    assert done.exit_code == 0, done.output
    assert "at equal surprise" in done.stdout.replace("\n", " ")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["answers"] >= 4
    assert [row["tokens"] for row in found["by_mention"]] == [found["by_mention"][0]["tokens"]] * REPEATS


def test_too_few_answers_are_refused(tiny_model: adi.Model) -> None:
    with pytest.raises(UsageError, match="2 of 2 answers have more than 4 tokens; at least 4 must"):
        familiarity(tiny_model, ["a b c", "d e f"], 8)
