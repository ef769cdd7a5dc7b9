"""Sudoku of 4x4 (boxes 2x2) and 6x6 (boxes of 2 rows by 3 columns), with unique solutions and known difficulty.

Train and test differ by solution: a grid belongs to the test where a hash of its digits says so, whatever its clues. Levels:
1, naked singles solve it; 2, hidden singles are needed too; 3, a guess is. ``batch`` draws from a pool of puzzles under the
symmetries of the grid (digits, bands, stacks, and rows and columns in them), which keep solutions unique and levels as they
are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from adi.errors import UsageError
from adi.tasks.products import Batch

TEST_SHARE = 10  # one solution in so many is for the test only


@dataclass(frozen=True)
class Sudoku:
    """One size of the puzzle: ``size`` digits, boxes of ``rows`` by ``columns``. A board is ``size ** 2`` numbers, 0 for a
    blank."""

    name: str
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def cells(self) -> int:
        return self.size**2

    @cached_property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """Rows, columns and boxes: the cells that hold each digit once."""
        n, places = self.size, list(np.ndindex(self.size, self.size))
        keys = (lambda r, c: (0, r), lambda r, c: (1, c), lambda r, c: (2, r // self.rows, c // self.columns))
        groups: dict[tuple[int, ...], list[int]] = {}
        for r, c in places:
            for key in keys:
                groups.setdefault(key(r, c), []).append(r * n + c)
        return tuple(map(tuple, groups.values()))

    @property
    def places(self) -> list[list[int]]:
        """The row, the column and the box of each cell."""
        cells = list(np.ndindex(self.size, self.size))
        boxes = [r // self.rows * self.rows + c // self.columns for r, c in cells]
        return [[r for r, _ in cells], [c for _, c in cells], boxes]

    @cached_property
    def peers(self) -> tuple[tuple[int, ...], ...]:
        """For each cell the others that share a unit with it."""
        return tuple(tuple({p for u in self.units if cell in u for p in u} - {cell}) for cell in range(self.cells))

    def parse(self, text: str) -> tuple[int, ...]:
        """A board from a text of one character per cell; UsageError for one that is no puzzle: its length, its characters, a
        digit twice in a row, column or box."""
        if len(text) != self.cells:
            raise UsageError(f"{text!r} has {len(text)} characters; a {self.name} puzzle has {self.cells}, '.' for a blank.")
        allowed = "".join(str(d) for d in range(1, self.size + 1))
        if bad := next((c for c in text if c not in allowed + ".0"), None):
            raise UsageError(f"{bad!r} is no cell of a {self.name} puzzle; write 1 to {self.size}, and '.' for a blank.")
        board = tuple(0 if c in ".0" else int(c) for c in text)
        if (digit := self.repeated(board)) is not None:
            raise UsageError(f"{text!r} is no puzzle: the digit {digit} stands twice in a row, column or box.")
        return board

    def repeated(self, board: Sequence[int]) -> int | None:
        """A digit that stands twice in a unit, or None."""
        for unit in self.units:
            digits = [board[c] for c in unit if board[c]]
            if twice := [d for d in digits if digits.count(d) > 1]:
                return twice[0]
        return None

    def solved(self, board: Sequence[int]) -> bool:
        """Whether every cell is filled and no rule broken."""
        return all(board) and self.repeated(board) is None

    def text(self, board: Sequence[int]) -> str:
        """One character per cell, as ``parse`` reads it."""
        return "".join(str(d) if d else "." for d in board)

    def solutions(self, board: Sequence[int], dice: np.random.Generator | None = None) -> Iterator[tuple[int, ...]]:
        """All solutions one by one, by bit masks and the cell of fewest candidates; in random order with ``dice``."""
        every = (1 << self.size) - 1
        masks = [every] * self.cells
        cells = [0] * self.cells
        for cell, digit in enumerate(board):
            if digit and not self._place(cells, masks, cell, int(digit)):
                return
        yield from self._search(cells, masks, dice)

    def _place(self, cells: list[int], masks: list[int], cell: int, digit: int) -> bool:
        bit = 1 << (digit - 1)
        if not masks[cell] & bit:
            return False
        cells[cell], masks[cell] = digit, bit
        for peer in self.peers[cell]:
            if not cells[peer]:
                masks[peer] &= ~bit
                if not masks[peer]:
                    return False
            elif cells[peer] == digit:
                return False
        return True

    def _search(self, cells: list[int], masks: list[int], dice: np.random.Generator | None) -> Iterator[tuple[int, ...]]:
        blanks = [c for c in range(self.cells) if not cells[c]]
        if not blanks:
            yield tuple(cells)
            return
        cell = min(blanks, key=lambda c: masks[c].bit_count())
        digits = [d for d in range(1, self.size + 1) if masks[cell] >> (d - 1) & 1]
        for digit in digits if dice is None else dice.permutation(digits):
            there, then = cells.copy(), masks.copy()
            if self._place(there, then, cell, int(digit)):
                yield from self._search(there, then, dice)

    def unique(self, board: Sequence[int]) -> bool:
        """Whether there is exactly one solution."""
        found = self.solutions(board)
        return next(found, None) is not None and next(found, None) is None

    def level(self, board: Sequence[int]) -> int:
        """The technique that a puzzle needs: 1 naked singles, 2 hidden singles, 3 a guess."""
        for level, hidden in ((1, False), (2, True)):
            if all(self._by_singles(board, hidden)):
                return level
        return 3

    def _by_singles(self, board: Sequence[int], hidden: bool) -> list[int]:
        cells, masks = [0] * self.cells, [(1 << self.size) - 1] * self.cells
        todo = [(c, int(d)) for c, d in enumerate(board) if d]
        while todo:
            for cell, digit in todo:
                if not cells[cell]:
                    self._place(cells, masks, cell, digit)
            todo = [(c, masks[c].bit_length()) for c in range(self.cells) if not cells[c] and masks[c].bit_count() == 1]
            if not todo and hidden:
                todo = list(self._hidden(cells, masks))
        return cells

    def _hidden(self, cells: list[int], masks: list[int]) -> Iterator[tuple[int, int]]:
        for unit in self.units:
            for digit in range(1, self.size + 1):
                places = [c for c in unit if not cells[c] and masks[c] >> (digit - 1) & 1]
                if len(places) == 1 and all(cells[c] != digit for c in unit):
                    yield places[0], digit

    def puzzle(self, dice: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A puzzle with one solution and that solution; its number of clues is drawn between the least that were found and
        all."""
        solution = self._solution(dice)
        board, wanted = list(solution), int(dice.integers(0, self.cells))
        for cell in dice.permutation(self.cells):
            if sum(map(bool, board)) <= wanted:
                break
            if self._needed(board, int(cell)):
                continue
            board[cell] = 0
        return tuple(board), solution

    def _solution(self, dice: np.random.Generator) -> tuple[int, ...]:
        return next(self.solutions([0] * self.cells, dice))

    def _needed(self, board: list[int], cell: int) -> bool:
        """Whether there is a solution with another digit in that cell: then its clue must stay."""
        seen = {board[peer] for peer in self.peers[cell]} | {board[cell]}
        others = (d for d in range(1, self.size + 1) if d not in seen)
        return any(next(self.solutions([*board[:cell], d, *board[cell + 1 :]]), None) is not None for d in others)

    def is_test(self, solutions_BC: np.ndarray) -> np.ndarray:
        """Which solutions are for the test only."""
        weights = np.array([pow(1_000_003, c + 1, 1 << 61) for c in range(self.cells)], np.uint64)
        with np.errstate(over="ignore"):
            hashes = (solutions_BC.astype(np.uint64) * weights).sum(-1)
            hashes ^= hashes >> np.uint64(29)
        found: np.ndarray = hashes % np.uint64(TEST_SHARE) == 0
        return found

    def batch(self, count: int, seed: int | Sequence[int], *, test: bool = False, pool: int = 2000) -> Batch:
        """``count`` puzzles: ``ids_BT`` with 0 for blanks, ``labels_BT`` the digits, ``difficulty_BT`` the number of blanks."""
        dice = np.random.default_rng(seed)
        ids, labels = np.empty((0, self.cells), np.int64), np.empty((0, self.cells), np.int64)
        while len(ids) < count:
            chosen = dice.integers(0, pool, 2 * count)
            cells, digits = self.symmetries(2 * count, dice)
            solutions = np.array([_solution(self, int(n), test) for n in chosen])
            solution = np.take_along_axis(digits, np.take_along_axis(solutions, cells, 1), 1)
            kept = np.flatnonzero(self.is_test(solution) == test)[: count - len(ids)]
            boards = np.array([_board(self, int(n), test) for n in chosen[kept]], np.int64).reshape(-1, self.cells)
            board = np.take_along_axis(digits[kept], np.take_along_axis(boards, cells[kept], 1), 1)
            ids, labels = np.concatenate([ids, board]), np.concatenate([labels, solution[kept]])
        return Batch(ids, labels, np.broadcast_to((ids == 0).sum(1, keepdims=True), ids.shape))

    def symmetries(self, count: int, dice: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Where each cell's content comes from, ``[count, cells]``, and what each digit becomes, ``[count, size + 1]``."""

        def lines(bands: int, inside: int) -> np.ndarray:
            order = dice.random((count, bands)).argsort(1)
            within = dice.random((count, bands, inside)).argsort(2)
            return (order[..., None] * inside + within).reshape(count, -1)

        rows, columns = lines(self.columns, self.rows), lines(self.rows, self.columns)
        cells = (rows[:, :, None] * self.size + columns[:, None, :]).reshape(count, -1)
        digits = dice.random((count, self.size)).argsort(1) + 1
        return cells, np.concatenate([np.zeros((count, 1), np.int64), digits], 1)


@lru_cache(maxsize=8192)
def _solution(game: Sudoku, number: int, test: bool) -> tuple[int, ...]:
    """The solution of a puzzle to start from; those of the test are of other seeds."""
    return game._solution(np.random.default_rng((int(test), number)))


@lru_cache(maxsize=8192)
def _board(game: Sudoku, number: int, test: bool) -> tuple[int, ...]:
    """The puzzle of that solution: drawn when it is wanted, for taking its clues away is slow."""
    return game.puzzle(np.random.default_rng((int(test), number)))[0]


GAMES = {"sudoku4": Sudoku("sudoku4", 2, 2), "sudoku6": Sudoku("sudoku6", 2, 3)}
