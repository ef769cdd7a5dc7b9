"""Pointer chasing: shuffled pairs "from, to" make one chain; from each of its symbols so many hops are to be followed.

The task of recursive pointer chasing, on which published halting found 11.8% at 8 hops: 16 pairs of 64 symbols. An item is
the pairs, the number of hops and the 16 symbols as starts, each of which has an answer; the difficulty is the number of hops.
Only answers are given in training, never the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adi.errors import UsageError
from adi.tasks.products import Batch

NONE = -100  # no answer at this place


@dataclass(frozen=True)
class Pointers:
    """Ids below ``symbols`` are symbols, id ``symbols + h - 1`` says h hops."""

    pairs: int = 16
    symbols: int = 64
    hops: int = 8
    longest: int = 12

    @property
    def length(self) -> int:
        return 3 * self.pairs + 1

    @property
    def vocabulary(self) -> int:
        return self.symbols + self.longest

    def batch(self, count: int, seed: int | Sequence[int], hops: Sequence[int] | None = None) -> Batch:
        """``count`` items, their hops drawn evenly from ``hops`` (1 to ``self.hops``)."""
        dice = np.random.default_rng(seed)
        allowed = np.arange(1, self.hops + 1) if hops is None else np.asarray(hops)
        if allowed.min() < 1 or allowed.max() > self.longest:
            raise UsageError(f"hops {sorted(map(int, allowed))} are not possible; they go from 1 to {self.longest}.")
        chain = dice.random((count, self.symbols)).argsort(1)[:, : self.pairs]  # a cycle through so many symbols
        order = dice.random((count, self.pairs)).argsort(1)
        links = np.stack([chain, np.roll(chain, -1, 1)], -1)
        shuffled = np.take_along_axis(links, order[..., None], 1).reshape(count, -1)
        start_BS, steps = dice.random((count, self.pairs)).argsort(1), dice.choice(allowed, count)
        labels = np.full((count, self.length), NONE)
        labels[:, -self.pairs :] = np.take_along_axis(chain, (start_BS + steps[:, None]) % self.pairs, 1)
        ids = np.concatenate([shuffled, self.symbols + steps[:, None] - 1, np.take_along_axis(chain, start_BS, 1)], 1)
        return Batch(ids, labels, np.broadcast_to(steps[:, None], labels.shape))

    def check(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids of one item; UsageError where they are no pairs, hops and starts."""
        found = tuple(int(i) for i in ids)
        if len(found) != self.length:
            raise UsageError(
                f"an item of pointers has {self.length} ids ({self.pairs} pairs, hops, {self.pairs} starts), not {len(found)}."
            )
        hops = found[2 * self.pairs]
        if bad := [i for n, i in enumerate(found) if n != 2 * self.pairs and not 0 <= i < self.symbols]:
            raise UsageError(f"{bad[0]} is no symbol of pointers; they go from 0 to {self.symbols - 1}.")
        if not self.symbols <= hops < self.vocabulary:
            raise UsageError(f"{hops} says no number of hops; {self.symbols} to {self.vocabulary - 1} say 1 to {self.longest}.")
        return found
