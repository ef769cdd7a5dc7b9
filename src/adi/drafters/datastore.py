"""``Datastore``: texts that the model wrote while its exits were trained, shipped with them; drafts are looked up there.

Retrieval-based drafting: REST (He et al. 2023). Nothing private is in it: the prompts are the trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from adi.drafters.ngram import LONGEST, NgramMatch, RunArray
from adi.errors import FileError
from adi.machine import give_back_memory

SHORTEST = 2


class Datastore:
    """Token sequences end to end, ``ids_N`` ``[N]``, and how long each is, ``lengths_M`` ``[M]``: arrays of int32. Its
    ``name`` is the source of its drafts: what two of them are right in is learned apart."""

    def __init__(self, ids_N: Any, lengths_M: Any, name: str = "datastore") -> None:
        self.ids_N, self.lengths_M, self.name = ids_N, lengths_M, name

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], name: str = "datastore") -> Datastore:
        flat = [token for ids in sequences for token in ids]
        return cls(np.array(flat, np.int32), np.array([len(ids) for ids in sequences], np.int32), name)

    def and_more(self, others: Datastore) -> Datastore:
        """These and then the others."""
        return Datastore(
            np.concatenate([self.ids_N, others.ids_N]), np.concatenate([self.lengths_M, others.lengths_M]), self.name
        )

    def arrays(self) -> dict[str, Any]:
        return {"ids_N": self.ids_N, "lengths_M": self.lengths_M}

    def check(self, vocabulary: int) -> None:
        """FileError for what cannot be such sequences."""
        for name, array in self.arrays().items():
            if array.ndim != 1 or array.dtype != np.int32 or not len(array) or int(array.min()) < 0:
                raise FileError(f"the datastore's {name} are no list of whole numbers of at least 0")
        if int(self.ids_N.max()) >= vocabulary or int(self.lengths_M.sum(dtype=np.int64)) != len(self.ids_N):
            raise FileError(f"the datastore holds ids outside the vocabulary [0, {vocabulary}), or their lengths do not add up")

    def find(self, text: Sequence[int], most: int) -> NgramMatch | None:
        """Up to ``most`` tokens that most often followed the longest run of the last tokens of ``text``, of at least two."""
        if most < 1:
            return None
        matched, tokens, shares = self._index.vote(text, most)
        return NgramMatch(tokens, matched, self.name, shares) if matched else None

    @cached_property
    def _index(self) -> RunArray:
        """Sorted at the first lookup; half a second for a million tokens."""
        ends = np.cumsum(self.lengths_M)[:-1]
        index = RunArray(np.split(self.ids_N, ends), LONGEST, SHORTEST)
        give_back_memory()  # sorting takes twice what it leaves
        return index
