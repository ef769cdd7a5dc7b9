"""Mazes: one way, found again by walking everywhere; no maze of the test is one of training turned or mirrored."""

from __future__ import annotations

import numpy as np
import pytest

from adi.errors import UsageError
from adi.tasks.mazes import GOAL, OPEN, START, WALL, WAY, Mazes

GAME = Mazes()
ROW = "S.......G"


def ways(board: list[int], cell: int, seen: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All ways to G that cross no cell twice."""
    if board[cell] == GOAL:
        return [(*seen, cell)]
    r, c = divmod(cell, 9)
    around = [(r + y, c + x) for y, x in ((0, 1), (1, 0), (0, -1), (-1, 0)) if 0 <= r + y < 9 and 0 <= c + x < 9]
    onward = [9 * y + x for y, x in around if board[9 * y + x] != WALL and 9 * y + x not in seen]
    return [way for step in onward for way in ways(board, step, (*seen, cell))]


@pytest.mark.parametrize("test", [False, True])
def test_the_way_is_the_only_one(test: bool) -> None:
    drawn = GAME.batch(20, (3,), test=test)
    for board, answer, steps in zip(drawn.ids_BT.tolist(), drawn.labels_BT.tolist(), drawn.difficulty_BT.tolist(), strict=True):
        (way,) = ways(board, board.index(START), ())
        assert {cell for cell, what in enumerate(answer) if what == WAY} == set(way[1:-1])
        assert set(steps) == {len(way) - 1}
        assert [OPEN if what == WAY else what for what in answer] == board
        assert GAME.solved(answer)
        assert GAME.is_test(np.array(board)) == test
        assert GAME.parse("".join(map(GAME.show, board))) == tuple(board)


def test_a_way_that_stops_or_strays_is_no_solution() -> None:
    drawn = GAME.batch(1, (0,))
    answer = drawn.labels_BT[0].tolist()
    way, off = (answer.index(what) for what in (WAY, OPEN))
    assert not GAME.solved([*answer[:way], OPEN, *answer[way + 1 :]])
    assert not GAME.solved([*answer[:off], WAY, *answer[off + 1 :]])


def test_turned_and_mirrored_mazes_stay_on_their_side() -> None:
    board = GAME.walls(np.random.default_rng(0)).reshape(9, 9)
    assert len({GAME.is_test(np.rot90(side, n)) for side in (board, board.T) for n in range(4)}) == 1
    drawn = [GAME.is_test(GAME.walls(np.random.default_rng(n))) for n in range(300)]
    assert 0.03 < np.mean(drawn) < 0.2


@pytest.mark.parametrize(
    ("item", "match"),
    [
        ([1, 2], "a text of 81 characters, not list"),
        (ROW, "has 9 characters; a maze has 81"),
        (ROW + "x" + "." * 71, "'x' is no cell"),
        (ROW + "S" + "." * 71, "has 2 S and 1 G"),
        ("S#......G" + "#" * 72, "no way leads"),
    ],
)
def test_what_is_no_maze_is_refused(item: object, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        GAME.parse(item)
