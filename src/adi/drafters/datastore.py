"""``Datastore``: texts that the model wrote while its exits were trained, shipped with them; drafts are looked up there.

Retrieval-based drafting: REST (He et al. 2023). Nothing private is in it: the prompts are the trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adi.cache import cache_folder
from adi.drafters import ngram
from adi.drafters.ngram import LONGEST, NgramMatch, RunArray
from adi.errors import FileError
from adi.files import whole_file
from adi.machine import give_back_memory
from adi.model.arrays import digest

SHORTEST = 2
KEPT_FROM = 100_000  # tokens, whose order is kept in the cache folder: fewer are sorted as quickly as they are read


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

    def prepare(self) -> None:
        """What takes long, once: the first lookup would do it otherwise."""
        self._index  # noqa: B018

    def find(self, text: Sequence[int], most: int) -> NgramMatch | None:
        """Up to ``most`` tokens that most often followed the longest run of the last tokens of ``text``, of at least two."""
        if most < 1:
            return None
        matched, tokens, shares = self._index.vote(text, most)
        return NgramMatch(tokens, matched, self.name, shares) if matched else None

    @cached_property
    def _index(self) -> RunArray:
        """Sorted at the first lookup, half a second for a million tokens; the order is kept in the cache folder, the tokens are
        not."""
        sequences = np.split(self.ids_N, np.cumsum(self.lengths_M)[:-1])
        if len(self.ids_N) < KEPT_FROM:
            return RunArray(sequences, LONGEST, SHORTEST)
        note = cache_folder() / "orders" / f"{digest(self.arrays().values(), ngram.__file__)}.npy"
        if (known := self._order(note)) is not None:
            return RunArray(sequences, LONGEST, SHORTEST, known)
        index = RunArray(sequences, LONGEST, SHORTEST)
        with suppress(FileError), whole_file(note) as fresh, fresh.open("wb") as file:
            np.save(file, index.places)
        give_back_memory()  # sorting takes twice what it leaves
        return index

    def _order(self, note: Path) -> Any:
        """The places that were kept; None where there are none, or what is damaged."""
        with suppress(OSError, ValueError, EOFError):
            places = np.load(note)
            findable = np.maximum(self.lengths_M - SHORTEST, 0).sum(dtype=np.int64)
            inside = places.ndim == 1 and places.dtype == np.int32 and len(places) == findable
            if inside and places.min(initial=SHORTEST) >= SHORTEST and places.max(initial=0) < len(self.ids_N):
                return places
        return None
