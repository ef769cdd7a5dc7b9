"""What is reported of a looped model on its task, against values that are worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from adi.decoding.looped.halting import Halted
from adi.errors import UsageError
from adi.measure.halting_controls import area, at_turns, curve, first_turns, interval, oracle, shuffled, signals, sweep
from adi.measure.solving import THRESHOLDS, certified, rank_correlation, solving_report
from adi.measure.turns import turns_of, turns_page
from adi.model.looped import LoopedConfig, LoopedForCausalLM
from adi.tasks.registry import task_named
from support import adi_

RIGHT = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], bool)  # turns by places: right from turn 1, 2, 3, never
SIGNAL = np.array([[0.9, 0.2, 0.1, 0.1], [0.9, 0.9, 0.3, 0.2], [0.9, 0.9, 0.9, 0.9]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 3, "vocab_size": 7}
    LoopedForCausalLM(LoopedConfig(**sizes, task="products-S3", halt_threshold=0.04)).save_pretrained(tmp_path)
    return tmp_path


def test_a_place_stops_where_its_signal_first_passes() -> None:
    assert first_turns(SIGNAL, 0.5).tolist() == [0, 1, 2, 2]
    assert first_turns(SIGNAL, 0.95).tolist() == [2, 2, 2, 2]
    assert first_turns(SIGNAL, -np.inf).tolist() == [0, 0, 0, 0]
    assert at_turns(RIGHT, first_turns(SIGNAL, 0.5)) == 0.75


def test_the_oracle_stops_at_the_first_right_answer() -> None:
    assert oracle(RIGHT) == (pytest.approx((1 + 2 + 3 + 3) / 4), 0.75)


def test_a_curve_ends_at_all_turns_and_a_perfect_signal_has_the_larger_area() -> None:
    points = curve(*sweep(RIGHT, SIGNAL))
    assert points[0] == (1.0, 0.25)
    assert points[-1] == (3.0, 0.75)
    points, blind = (curve(*sweep(RIGHT, signal.astype(float))) for signal in (RIGHT, RIGHT[:, ::-1]))
    assert area(points, 3) > area(blind, 3)
    assert area([(1.0, 0.5), (3.0, 0.5)], 3) == pytest.approx(0.5)


def test_random_halting_has_the_same_turns() -> None:
    found = [shuffled(RIGHT, first_turns(SIGNAL, 0.5), seed) for seed in range(200)]
    by_turn = [RIGHT[t].mean() for t in (0, 1, 2, 2)]
    assert np.mean(found) == pytest.approx(np.mean(by_turn), abs=0.03)


def test_an_interval_holds_its_mean_and_narrows_with_items() -> None:
    few, many = (interval([0.0, 1.0] * n) for n in (5, 500))
    assert few[0] < many[0] < 0.5 < many[1] < few[1]


def test_correlation_with_difficulty_holds_the_place_fixed() -> None:
    """Turns that only follow the place correlate with distance too, until the place is held fixed."""
    task = task_named("products-S3")
    drawn = task.batch(200, (0,), test=True)
    logits = torch.zeros(*drawn.ids_BT.shape, 7)
    place = torch.arange(32).expand(200, 32)
    assert abs(rank_correlation(task, drawn, Halted(logits, place // 4))) < 0.1
    by_distance = torch.tensor(np.log1p(drawn.difficulty_BT).round()).long()
    assert rank_correlation(task, drawn, Halted(logits, by_distance)) > 0.9
    assert rank_correlation(task, drawn, Halted(logits, torch.ones_like(place))) == 0


def test_signals_are_of_every_turn(folder: Path) -> None:
    model = LoopedForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(task_named("products-S3").batch(3, (1,)).ids_BT)
    answers, found = signals(model, ids)
    assert answers.shape == (3, 3, 32)
    assert {name: signal.shape for name, signal in found.items()} == dict.fromkeys(found, (3, 3, 32))
    assert sorted(found) == ["entropy", "gate", "stability", "state_change", "top_probability"]


def test_the_report_says_what_the_shell_prints(folder: Path) -> None:
    import json

    found = solving_report(str(folder), 12, 5)
    shown = adi_("solve", folder, "--count", 12, "--seed", 5, "--json")
    assert json.loads(shown.output).items() >= json.loads(json.dumps(found)).items()
    assert found["by_turn"][-1] == found["accuracy_all_turns"]
    assert found["accuracy_halted_interval"][0] <= found["accuracy_halted"] <= found["accuracy_halted_interval"][1]
    assert set(found["controls"]["area"]) == {"gate", "top_probability", "entropy", "stability", "state_change"}
    for name, (low, high) in found["controls"]["gate_ahead_interval"].items():
        assert low <= found["controls"]["area"]["gate"] - found["controls"]["area"][name] <= high
    text = adi_("solve", folder, "--count", 12, "--time", "1,2").output
    assert "batch of 2 on hf: " in text
    assert "rank correlation of turns with difficulty" in text


@pytest.mark.slow  # a shipped net, every threshold of it
def test_halting_is_certified_against_all_turns() -> None:
    found = certified("products", 0.02, 256, 7)
    assert found is not None
    assert found["observed"] < 0.02
    assert 2 < found["mean_turns"] < 4
    assert found["threshold"] in THRESHOLDS
    text = adi_("solve", "products", "--certify", 0.05, "--count", 128, "--seed", 7).output
    assert "certified: at threshold" in text


def test_what_cannot_be_certified_is_said() -> None:
    with pytest.raises(UsageError, match="149 are needed"):
        certified("products", 0.02, 100, 0)
    with pytest.raises(UsageError, match="level is 2"):
        certified("products", 2, 100, 0)


def test_an_item_is_shown_turn_by_turn(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "turns.html"
    shown = adi_("solve", folder, "1,2,6,3", "--page", page)
    assert shown.exit_code == 0, shown.output
    assert "ids  1 2 R 3" in shown.output
    turns = turns_of(str(folder), "1,2,6,3")
    assert shown.output.count("\nturn ") == len(turns.answers_RT)
    assert page.read_text() == turns_page(turns)
    assert "products-S3, turn by turn" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["1,9"], "9 is no id of S3"),
        (["one"], "'one' is no list of ids"),
        (["1,2", "--count", 3], "leave 1,2 out"),
        (["--certify", 2], "level is 2"),
        (["--threshold", 2], "threshold"),
        (["--price", 0.1], "knows no price"),
        (["1,2", "--starts", 3], "--starts is of many drawn items: leave 1,2 out"),
        (["--prices", "a"], "--prices are numbers with commas, such as 0.01,0.1, not 'a'"),
        (["--prices", "0.1"], "knows no price"),
        (["--against", "/none", "--count", 3], "no looped model '/none'"),
        (["--starts", 3, "--count", 4], "starts is 3, a race"),
    ],
)
def test_what_cannot_be_solved_is_refused(folder: Path, arguments: list[object], match: str) -> None:
    found = adi_("solve", folder, *arguments)
    assert found.exit_code == 2
    assert match in found.output + found.stderr
