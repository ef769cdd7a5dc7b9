"""p-hop induction (Sanford et al. 2024): to where a letter stood before, and on from the letter that followed it, p times.

One hop from place i leads to the place after the last earlier one with i's letter; the answer at i is the letter that p hops
reach, or "none" where there is no earlier one. p stands first in the text. About log2 p turns can do it. Training and test
differ by seed: 16 * 4 ** 64 texts are too many for one to come twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from adi.errors import UsageError
from adi.tasks.products import Batch, id_list


@dataclass(frozen=True)
class Hops:
    """Ids below ``letters`` are letters, id ``letters`` is "none" (an answer only), id ``letters + p`` says p hops. The
    difficulty of a place is the number of hops that are followed, 0 at the first."""

    places: int = 64
    letters: int = 4
    most: int = 16
    name: str = "p-hop"
    unit: Literal["place"] = "place"
    causal: bool = True
    place_features: None = None
    bins: tuple[tuple[int, int], ...] = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16))

    @property
    def length(self) -> int:
        return self.places + 1

    @property
    def vocabulary(self) -> int:
        return self.letters + 1 + self.most

    def batch(self, count: int, seed: Sequence[int], *, test: bool = False) -> Batch:
        """``count`` texts, their p drawn evenly from 1 to ``most``."""
        dice = np.random.default_rng((int(test), *seed))
        hops_B = dice.integers(1, self.most + 1, count)
        text_BT = dice.integers(0, self.letters, (count, self.places))
        place = np.arange(self.places)
        before_BTT = (text_BT[:, :, None] == text_BT[:, None, :]) & (place[None, :] < place[:, None])
        next_BT = np.where(before_BTT, place + 1, -1).max(-1)
        at_BT, followed_BT = np.broadcast_to(place, text_BT.shape), np.zeros_like(text_BT)
        for hop in range(1, self.most + 1):
            going = (hop <= hops_B[:, None]) & (at_BT >= 0)
            at_BT = np.where(going, np.take_along_axis(next_BT, np.maximum(at_BT, 0), 1), at_BT)
            followed_BT = followed_BT + going
        answers_BT = np.where(at_BT < 0, self.letters, np.take_along_axis(text_BT, np.maximum(at_BT, 0), 1))
        first = np.ones((count, 1), np.int64)
        return Batch(
            np.concatenate([self.letters + hops_B[:, None], text_BT], 1),
            np.concatenate([first * self.letters, answers_BT], 1),
            np.concatenate([first * 0, followed_BT], 1),
        )

    def asked(self, ids_BT: np.ndarray) -> np.ndarray:
        """All places have an answer."""
        return np.ones(ids_BT.shape, bool)

    def parse(self, item: Any) -> tuple[int, ...]:
        """The ids of an item; UsageError where they are no number of hops and letters."""
        found = id_list(self.name, item)
        if len(found) < 2:
            raise UsageError(f"an item of {self.name} holds {len(found)} ids; give the number of hops and at least one letter.")
        if not self.letters < found[0] < self.vocabulary:
            raise UsageError(
                f"{found[0]} says no number of hops; {self.letters + 1} to {self.vocabulary - 1} say 1 to {self.most}."
            )
        if bad := [i for i in found[1:] if not 0 <= i < self.letters]:
            raise UsageError(f"{bad[0]} is no letter of {self.name}; they go from 0 to {self.letters - 1}.")
        return found

    def show(self, number: int) -> str:
        """An id as one reads it: a letter, "-" for none, or p."""
        return "abcdefghijklmnop"[number] if number < self.letters else str(number - self.letters or "-")
