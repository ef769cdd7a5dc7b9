"""Sudoku: puzzles have one solution, symmetries keep it, train and test share none, and what is no puzzle is refused."""

from __future__ import annotations

import numpy as np
import pytest

from adi.errors import UsageError
from adi.tasks.registry import task_named
from adi.tasks.sudoku import GAMES, Sudoku

SIX = GAMES["sudoku6"]


@pytest.mark.parametrize("game", GAMES.values(), ids=GAMES)
def test_units_hold_each_cell_three_times(game: Sudoku) -> None:
    assert len(game.units) == 3 * game.size
    assert sorted(c for unit in game.units for c in unit) == sorted(3 * list(range(game.cells)))
    assert (27, 28, 29, 33, 34, 35) in SIX.units  # two rows by three columns


def test_solutions_are_counted_as_by_trying_everything() -> None:
    four = GAMES["sudoku4"]
    assert sum(1 for _ in four.solutions([0] * 16)) == 288
    board = four.parse("1...............")
    assert sum(1 for _ in four.solutions(board)) == 72
    assert not four.unique(board)


@pytest.mark.parametrize("test", [False, True])
def test_drawn_puzzles_have_their_one_solution(test: bool) -> None:
    drawn = SIX.batch(20, 5, test=test, pool=30)
    for board, solution, blanks in zip(
        drawn.ids_BT.tolist(), drawn.labels_BT.tolist(), drawn.difficulty_BT.tolist(), strict=True
    ):
        assert list(SIX.solutions(board)) == [tuple(solution)]
        assert set(blanks) == {board.count(0)}
    assert (SIX.is_test(drawn.labels_BT) == test).all()


def test_one_solution_in_ten_is_for_the_test() -> None:
    dice = np.random.default_rng(0)
    grids = np.array([next(SIX.solutions([0] * 36, dice)) for _ in range(300)])
    assert 0.03 < SIX.is_test(grids).mean() < 0.2


def test_levels_are_what_singles_reach() -> None:
    solution = SIX.text(SIX.batch(1, 0, pool=5).labels_BT[0])
    assert SIX.level(SIX.parse("." + solution[1:])) == 1
    levels = {SIX.level(SIX.puzzle(np.random.default_rng((0, n)))[0]) for n in range(120)}
    assert levels == {1, 2, 3}
    assert SIX.level([0] * 36) == 3
    assert SIX.level(np.zeros(36, np.int64)) == 3
    assert SIX.unique(np.array(SIX.parse(solution)))


def test_clues_that_go_are_those_without_which_the_solution_stays_the_only_one() -> None:
    board, solution = SIX.puzzle(np.random.default_rng(4))
    for cell in (c for c in range(36) if board[c]):
        fewer = [*board[:cell], 0, *board[cell + 1 :]]
        assert SIX._needed(list(board), cell) != SIX.unique(fewer)
    assert list(SIX.solutions(board)) == [solution]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("12", "has 2 characters; a sudoku6 puzzle has 36"),
        ("7" + "." * 35, "'7' is no cell of a sudoku6 puzzle; write 1 to 6"),
        ("11" + "." * 34, "the digit 1 stands twice"),
    ],
)
def test_what_is_no_puzzle_is_refused(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        SIX.parse(text)


def test_tasks_are_found_by_name() -> None:
    assert task_named("sudoku6").length == 36
    with pytest.raises(UsageError, match=r"no task 'chess'; choose one of products-S3"):
        task_named("chess")
