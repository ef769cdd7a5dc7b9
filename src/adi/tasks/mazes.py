"""Mazes of 9x9 cells: mark the way from S to G. The walls leave a tree of rooms, so there is one way; its length is the
difficulty.

Train and test differ by the walls: a maze belongs to the test where a hash of its walls says so, the same for all turns and
mirror images of a maze, wherever S and G are.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from adi.errors import UsageError
from adi.tasks.products import Batch

WALL, OPEN, START, GOAL, WAY = range(5)
SIGNS = "#.SG*"
TEST_SHARE = 10  # one maze in so many is for the test only


@dataclass(frozen=True)
class Mazes:
    """``size`` cells a side, an odd number: every second cell of every second row is a room. The answer is the board with
    ``WAY`` in the open cells of the way."""

    size: int = 9
    name: str = "mazes"
    unit: Literal["item"] = "item"
    causal: bool = False
    vocabulary: int = len(SIGNS)
    bins: tuple[tuple[int, int], ...] = ((1, 4), (5, 8), (9, 12), (13, 16), (17, 24), (25, 48))

    @property
    def length(self) -> int:
        return self.size**2

    @property
    def place_features(self) -> list[list[int]]:
        """The row and the column of each cell."""
        return [[cell // self.size for cell in range(self.length)], [cell % self.size for cell in range(self.length)]]

    @cached_property
    def beside(self) -> list[list[int]]:
        """The cells next to each cell."""
        cells = {(r, c): r * self.size + c for r in range(self.size) for c in range(self.size)}
        steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
        return [[cells[r + y, c + x] for y, x in steps if (r + y, c + x) in cells] for r, c in cells]

    @cached_property
    def doors(self) -> list[tuple[int, int, int]]:
        """The cells between two rooms, with the rooms."""
        rooms = [r * self.size + c for r in range(0, self.size, 2) for c in range(0, self.size, 2)]
        right = [(a, a + 1, a + 2) for a in rooms if a % self.size + 2 < self.size]
        return right + [(a, a + self.size, a + 2 * self.size) for a in rooms if a + 2 * self.size < self.length]

    def walls(self, dice: np.random.Generator) -> np.ndarray:
        """A board of rooms joined into one tree, by doors in random order (Kruskal 1956)."""
        board, root = np.full(self.length, WALL), list(range(self.length))

        def top(room: int) -> int:
            while root[room] != room:
                room = root[room]
            return room

        for n in dice.permutation(len(self.doors)):
            a, door, b = self.doors[n]
            board[[a, b]] = OPEN
            if top(a) != top(b):
                root[top(a)], board[door] = top(b), OPEN
        return board

    def is_test(self, board: np.ndarray) -> bool:
        """Whether a maze is for the test only, by its walls."""
        square = (np.asarray(board).reshape(self.size, self.size) == WALL).astype(np.uint8)
        alike = [np.rot90(side, turns).tobytes() for side in (square, square.T) for turns in range(4)]
        return zlib.crc32(min(alike)) % TEST_SHARE == 0

    def way(self, board: Sequence[int]) -> list[int] | None:
        """The cells of a shortest way from S to G, both with it; None where there is none."""
        start = list(board).index(START)
        came, edge = {start: start}, [start]
        while edge and board[edge[0]] != GOAL:
            for cell in self.beside[edge[0]]:
                if board[cell] != WALL and cell not in came:
                    came[cell] = edge[0]
                    edge.append(cell)
            edge.pop(0)
        if not edge:
            return None
        found = [edge[0]]
        while found[-1] != start:
            found.append(came[found[-1]])
        return found[::-1]

    def batch(self, count: int, seed: Sequence[int], *, test: bool = False) -> Batch:
        """``count`` mazes; ``difficulty_BT`` is the number of steps from S to G."""
        dice = np.random.default_rng((int(test), *seed))
        boards, answers, steps = list[np.ndarray](), list[np.ndarray](), list[list[int]]()
        while len(boards) < count:
            board = self.walls(dice)
            if self.is_test(board) != test:
                continue
            board[dice.choice(np.flatnonzero(board == OPEN), 2, replace=False)] = START, GOAL
            way = self.way(board.tolist())
            assert way is not None
            answer = board.copy()
            answer[way[1:-1]] = WAY
            boards.append(board)
            answers.append(answer)
            steps.append([len(way) - 1])
        return Batch(np.array(boards), np.array(answers), np.broadcast_to(np.array(steps), (count, self.length)))

    def asked(self, ids_BT: np.ndarray) -> np.ndarray:
        """The open cells."""
        return np.asarray(ids_BT == OPEN)

    def parse(self, item: Any) -> tuple[int, ...]:
        """A maze from a text of "#", ".", one S and one G; UsageError for what is none, or where no way leads."""
        if not isinstance(item, str):
            raise UsageError(f"an item of {self.name} is a text of {self.length} characters, not {type(item).__name__}.")
        if len(item) != self.length:
            raise UsageError(f"{item!r} has {len(item)} characters; a maze has {self.length}, row by row.")
        if bad := next((c for c in item if c not in SIGNS[:WAY]), None):
            raise UsageError(f"{bad!r} is no cell of a maze; write '#' for a wall, '.' for an open cell, S and G.")
        if (item.count("S"), item.count("G")) != (1, 1):
            raise UsageError(f"the maze has {item.count('S')} S and {item.count('G')} G; it needs one of each.")
        board = tuple(map(SIGNS.index, item))
        if self.way(board) is None:
            raise UsageError(f"no way leads from S to G in {item!r}; open a wall.")
        return board

    def show(self, number: int) -> str:
        """The sign of a cell."""
        return SIGNS[number]

    def solved(self, board: Sequence[int]) -> bool:
        """Whether exactly a shortest way from S to G is marked."""
        way = self.way(board) or []
        marked = {cell for cell, what in enumerate(board) if what == WAY}
        return bool(way) and len(marked) == len(way) - 2 and _joined(self, board, marked)


def _joined(game: Mazes, board: Sequence[int], marked: set[int]) -> bool:
    """Whether the marked cells join S to G."""
    only = [what if what in (START, GOAL) or cell in marked else WALL for cell, what in enumerate(board)]
    return game.way(only) is not None
