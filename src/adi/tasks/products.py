"""Products with resets: at each place the product of the group elements since the last RESET.

An element's difficulty is its distance to the last RESET: a product of n elements needs about log2 n turns. S3 and D4 do not
commute, Z7 does (Merrill and Sabharwal 2023: what depth a transformer needs for such products).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from adi.errors import UsageError

RESET_SHARE = 0.12


@dataclass(frozen=True)
class Batch:
    """``ids_BT``, the answers ``labels_BT`` at the same places, and ``difficulty_BT`` in the task's own unit."""

    ids_BT: np.ndarray
    labels_BT: np.ndarray
    difficulty_BT: np.ndarray


@dataclass(frozen=True)
class Group:
    """A finite group: elements 0 to ``size - 1``, 0 the identity; id ``size`` is RESET."""

    name: str
    size: int

    @cached_property
    def product(self) -> np.ndarray:
        """``product[old, token]`` is what follows."""
        return _TABLES[self.name]()

    @property
    def reset(self) -> int:
        return self.size

    def answers(self, ids_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The running products, and the distances to the last RESET (or to the beginning, which counts as one)."""
        products, distances = np.zeros_like(ids_BT), np.zeros_like(ids_BT)
        now = np.zeros(len(ids_BT), ids_BT.dtype)
        since = np.zeros(len(ids_BT), ids_BT.dtype)
        for t, ids_B in enumerate(ids_BT.T):
            resets = ids_B == self.reset
            now = np.where(resets, 0, self.product[now, np.minimum(ids_B, self.size - 1)])
            since = np.where(resets, 0, since + 1)
            products[:, t], distances[:, t] = now, since
        return products, distances

    def batch(self, count: int, length: int, seed: int | Sequence[int]) -> Batch:
        """``count`` texts of ``length`` ids, drawn from ``seed``."""
        dice = np.random.default_rng(seed)
        ids_BT = dice.integers(0, self.size, (count, length))
        ids_BT[dice.random((count, length)) < RESET_SHARE] = self.reset
        return Batch(ids_BT, *self.answers(ids_BT))

    def check(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids as integers; UsageError for one that is no element and no RESET, and for none at all."""
        found = tuple(int(i) for i in ids)
        if not found:
            raise UsageError(f"an item of {self.name} holds no ids; give at least one.")
        if bad := [i for i in found if not 0 <= i <= self.reset]:
            raise UsageError(f"{bad[0]} is no id of {self.name}; elements are 0 to {self.size - 1}, RESET is {self.reset}.")
        return found


def id_list(name: str, item: Any) -> tuple[int, ...]:
    """An item as ids; UsageError for what is no list of them."""
    if isinstance(item, str) or not hasattr(item, "__iter__"):
        raise UsageError(f"an item of {name} is a list of ids, not {type(item).__name__}.")
    return tuple(int(i) for i in item)


def _symmetric() -> np.ndarray:
    """S3: permutations of (0, 1, 2) in lexicographic order; ``new[k] = old[token[k]]``."""
    elements = list(itertools.permutations(range(3)))
    return _table(elements, lambda old, token: tuple(old[k] for k in token))


def _dihedral() -> np.ndarray:
    """D4: (turns, flips) of a square."""
    elements = [(r, f) for f in range(2) for r in range(4)]
    return _table(elements, lambda a, b: ((a[0] + (-b[0] if a[1] else b[0])) % 4, a[1] ^ b[1]))


def _cyclic() -> np.ndarray:
    return _table(list(range(7)), lambda a, b: (a + b) % 7)


def _table(elements: list, product) -> np.ndarray:  # type: ignore[no-untyped-def, type-arg]
    place = {e: i for i, e in enumerate(elements)}
    return np.array([[place[product(a, b)] for b in elements] for a in elements])


_TABLES = {"S3": _symmetric, "D4": _dihedral, "Z7": _cyclic}
GROUPS = {"S3": Group("S3", 6), "D4": Group("D4", 8), "Z7": Group("Z7", 7)}
