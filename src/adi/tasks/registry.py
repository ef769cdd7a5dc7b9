"""The tasks by name, as training and ``adi solve`` draw from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from adi.errors import UsageError
from adi.tasks.hops import Hops
from adi.tasks.mazes import Mazes
from adi.tasks.pointers import Pointers
from adi.tasks.products import GROUPS, Batch, Group, id_list
from adi.tasks.stories import Stories
from adi.tasks.sudoku import GAMES, Sudoku


class Problem(Protocol):
    """Items with known answers. ``unit``: whether a place halts on its own, or an item as a whole."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> Literal["place", "item"]: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def causal(self) -> bool: ...

    @property
    def place_features(self) -> list[list[int]] | None:
        """What a place of an item is, such as its row, for learned places; None for its number alone."""
        ...

    @property
    def length(self) -> int:
        """Places of an item while training."""
        ...

    def batch(self, count: int, seed: Sequence[int], *, test: bool = False) -> Batch:
        """``count`` items; those of the test never appear in training."""
        ...

    @property
    def bins(self) -> tuple[tuple[int, int], ...]:
        """From and to of the difficulties that a report puts together."""
        ...

    def asked(self, ids_BT: np.ndarray) -> np.ndarray:
        """The places of items that are asked for, as many of each item of a test whose places halt one by one."""
        ...

    def parse(self, item: Any) -> tuple[int, ...]:
        """A user's item as ids; UsageError for what is none."""
        ...

    def show(self, number: int) -> str:
        """An id, of an item or an answer, as one reads it."""
        ...


@dataclass(frozen=True)
class Products:
    """``products-GROUP``: texts of ``length`` ids."""

    group: Group
    length: int = 32
    unit: Literal["place"] = "place"
    causal: bool = True
    place_features: None = None
    bins: tuple[tuple[int, int], ...] = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32))

    @property
    def name(self) -> str:
        return f"products-{self.group.name}"

    @property
    def vocabulary(self) -> int:
        return self.group.size + 1

    def batch(self, count: int, seed: Sequence[int], *, test: bool = False) -> Batch:
        """Training and test differ by seed: of 7 ** 32 texts none comes twice."""
        return self.group.batch(count, self.length, (int(test), *seed))

    def asked(self, ids_BT: np.ndarray) -> np.ndarray:
        """All places have an answer."""
        return np.ones(ids_BT.shape, bool)

    def show(self, number: int) -> str:
        """The number of an element, or R."""
        return "R" if number == self.group.reset else str(number)

    def parse(self, item: Any) -> tuple[int, ...]:
        """The ids of an item."""
        return self.group.check(id_list(self.name, item))


@dataclass(frozen=True)
class Puzzles:
    """``sudoku4`` and ``sudoku6``."""

    game: Sudoku
    unit: Literal["item"] = "item"
    causal: bool = False
    bins: tuple[tuple[int, int], ...] = ((0, 8), (9, 14), (15, 20), (21, 24), (25, 36))

    @property
    def name(self) -> str:
        return self.game.name

    @property
    def vocabulary(self) -> int:
        return self.game.size + 1

    @property
    def length(self) -> int:
        return self.game.cells

    @property
    def place_features(self) -> list[list[int]]:
        """The row, column and box of each cell."""
        return self.game.places

    def batch(self, count: int, seed: Sequence[int], *, test: bool = False) -> Batch:
        """Training and test differ by solution."""
        return self.game.batch(count, (int(test), *seed), test=test)

    def asked(self, ids_BT: np.ndarray) -> np.ndarray:
        """The blanks."""
        return np.asarray(ids_BT == 0)

    def show(self, number: int) -> str:
        """A digit, or "." for a blank."""
        return str(number or ".")

    def solved(self, board: Sequence[int]) -> bool:
        """Whether every cell is filled and no rule broken."""
        return self.game.solved(board)

    def parse(self, item: Any) -> tuple[int, ...]:
        """The board of an item."""
        if not isinstance(item, str):
            raise UsageError(f"an item of {self.name} is a text of {self.length} characters, not {type(item).__name__}.")
        return self.game.parse(item)


@dataclass(frozen=True)
class Chains:
    """``pointers``: the starts have an answer. Learned places know their pair and their part in it."""

    game: Pointers = field(default_factory=Pointers)
    name: str = "pointers"
    unit: Literal["item"] = "item"
    causal: bool = False
    bins: tuple[tuple[int, int], ...] = tuple((n, n) for n in range(1, 13))

    @property
    def place_features(self) -> list[list[int]]:
        """The pair of each id, which is the number of hops or of the start where it is in none; and its part in it."""
        n = self.game.pairs
        return [[*np.repeat(range(n), 2).tolist(), *range(n, 2 * n + 1)], [0, 1] * n + [2] + [3] * n]

    @property
    def vocabulary(self) -> int:
        return self.game.vocabulary

    @property
    def length(self) -> int:
        return self.game.length

    def batch(self, count: int, seed: Sequence[int], *, test: bool = False) -> Batch:
        """Training and test differ by seed."""
        return self.game.batch(count, (int(test), *seed))

    def asked(self, ids_BT: np.ndarray) -> np.ndarray:
        """The starts."""
        return np.broadcast_to(np.arange(self.length) >= self.length - self.game.pairs, ids_BT.shape)

    def show(self, number: int) -> str:
        """The number of a symbol in two digits, or so many hops."""
        return f"{number:02d}" if number < self.game.symbols else f"{number - self.game.symbols + 1} hops"

    def parse(self, item: Any) -> tuple[int, ...]:
        """The ids of an item."""
        return self.game.check(id_list(self.name, item))


Grid = Puzzles | Mazes
_ALL: list[Problem] = [*map(Products, GROUPS.values()), *map(Puzzles, GAMES.values()), Chains(), Hops(), Mazes(), Stories()]
TASKS = {task.name: task for task in _ALL}


def most_hops(task: Problem) -> int:
    """The most hops of the task's items; UsageError for a task without."""
    if isinstance(task, Chains):
        return task.game.hops
    if isinstance(task, Hops):
        return task.most
    raise UsageError(f"easy_first is for tasks with hops, pointers and p-hop; {task.name} has none: leave it out.")


def easier(task: Problem, hops: int) -> Problem:
    """The task with items of at most so many hops; UsageError for a task without."""
    if isinstance(task, Chains):
        return replace(task, game=replace(task.game, hops=hops))
    return replace(task, most=hops) if isinstance(task, Hops) else easier(task, most_hops(task))


def task_named(name: str) -> Problem:
    """The task of that name; UsageError names those that exist."""
    if name not in TASKS:
        raise UsageError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[name]
