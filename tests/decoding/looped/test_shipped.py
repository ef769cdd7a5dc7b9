"""The shipped looped models do what docs/loops.md says, and the contract of ``adi.solve`` is kept."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np

import adi
from adi.files import package_data
from adi.measure.solving import solving_report
from adi.measure.turns import turns_of
from adi.model.hub import shipped_looped
from adi.schema import read_json_as
from adi.tasks.products import GROUPS
from adi.tasks.registry import task_named
from adi.tasks.sudoku import GAMES
from adi.training.train_looped import TrainSettings


def test_products_are_right_at_the_depth_that_they_need() -> None:
    found = solving_report("products", 128, 3)
    assert found["accuracy_all_turns"] > 0.985
    assert found["accuracy_halted"] > found["accuracy_all_turns"] - 0.005
    assert found["mean_turns"] < 2.7
    assert found["rank_correlation"] > 0.9
    assert found["controls"]["random_same_turns"] < found["accuracy_halted"] - 0.1
    turns = [row["turns"] for row in found["by_difficulty"]]
    assert turns == sorted(turns)


def test_solve_gives_a_number_of_turns_for_every_place() -> None:
    items = [[1, 4, 6, 2, 5], [6, 6, 3], [0]]
    for item, found in zip(items, adi.solve("products", items), strict=True):
        wanted, _ = GROUPS["S3"].answers(np.array([item]))
        assert found.answers == wanted[0].tolist()
        assert isinstance(found.turns, list)
        assert len(found.turns) == len(item)
        assert max(found.turns) <= 3
    full = adi.solve("products", items, halt=False)
    assert [each.turns for each in full] == [[8] * len(item) for item in items]


def test_puzzles_of_unseen_grids_are_solved_and_hard_ones_take_longer() -> None:
    game = GAMES["sudoku6"]
    drawn = [game.puzzle(np.random.default_rng((5, n))) for n in range(160)]
    unseen = [(board, found) for board, found in drawn if game.is_test(np.array([found]))[0]]
    assert len(unseen) >= 10
    puzzles = [game.text(board) for board, _ in unseen]
    halted = adi.solve("sudoku6", puzzles, verified=True)
    solved = [each.answers == game.text(wanted) for each, (_, wanted) in zip(halted, unseen, strict=True)]
    assert sum(solved) >= len(solved) - 1
    turns, blanks = np.array([each.turns for each in halted]), np.array([board.count(0) for board, _ in unseen])
    assert turns[blanks <= 12].mean() + 2 < turns[blanks >= 20].mean()
    assert [each.turns for each in adi.solve("sudoku6", puzzles, halt=False)] == [16] * len(puzzles)


def test_pointers_are_followed_by_a_hop_a_turn() -> None:
    drawn = task_named("pointers").batch(48, (3,), test=True)
    hops = drawn.difficulty_BT[:, 0].tolist()
    found = adi.solve("pointers", drawn.ids_BT)
    right = [each.answers == labels[33:].tolist() for each, labels in zip(found, drawn.labels_BT, strict=True)]
    assert sum(right) >= 46
    assert sum(each.turns == n for each, n in zip(found, hops, strict=True)) >= 46
    assert set(hops) == set(range(1, 9))


def test_pointers_are_shown_at_their_starts() -> None:
    shown = turns_of("pointers", None, seed=4)
    given, starts, *turns, summary = shown.lines()
    pairs, hops = given.rsplit(" ", 2)[0].split(), int(given.split()[-2])
    links, ends = dict(zip(pairs[::2], pairs[1::2], strict=True)), starts.split()[1:]
    for _ in range(hops):
        ends = [links[end] for end in ends]
    assert re.sub(r"\[.*?\]", "", turns[-1]).split()[2:] == ends
    assert summary == f"halted after {hops} turns of 9"


def test_a_puzzle_is_shown_before_it_is_solved() -> None:
    """Where nothing is bold, as in a pipe, clues and answers look alike."""
    shown = turns_of("sudoku6", "...1.3" + "." * 30)
    assert shown.lines()[0] == ". . . 1 . 3"
    assert "turn 1" in shown.lines()[7]


def test_shipped_models_are_small_and_the_examples_made_them() -> None:
    folder = package_data("looped")
    assert shipped_looped() == ["pointers", "products", "sudoku6"]
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 8 << 20
    for name in shipped_looped():
        made_by = read_json_as(folder / name / "train.json", TrainSettings, "training settings")
        example = Path(__file__).parents[3] / "examples" / "train" / f"{name}.toml"
        assert TrainSettings.from_json(tomllib.loads(example.read_text())) == made_by
