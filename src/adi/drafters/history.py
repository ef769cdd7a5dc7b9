"""``History``: a bounded memory of past outputs on disk, asked what followed the last tokens in any of them.

Prompt lookup (Saxena 2023) over more than the text at hand, in the manner of REST (He et al. 2023), which retrieves drafts
from a sorted datastore; here the datastore is what this user's models wrote before. The file holds private text.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adi.drafters.history_file import WORD, Header, HistoryFile, read_header
from adi.drafters.ngram import LONGEST, NgramMatch, RunArray, RunTrie
from adi.errors import AdiError
from adi.files import expanded

if TYPE_CHECKING:
    from adi.drafters.ngram import Ids

SHORTEST = 2
LIMIT_TOKENS = 262_144
FRESH_TOKENS = 32_768  # so many are kept beside the sorted index before all are sorted again
BORDER = (1 << 32) - 1  # stands before every sequence in the text of the fresh ones; no vocabulary goes that far


@dataclass(frozen=True)
class HistoryInfo:
    """What a habits file holds: ``sequences`` of ``tokens`` in all, in ``bytes`` on disk."""

    path: Path
    sequences: int
    tokens: int
    bytes: int
    limit_tokens: int
    vocabulary: int
    fingerprint: str


class History:
    """Past outputs of one tokenizer. ``find`` what came next in them, ``learn`` another.

    Any number of processes may use one file. What others learn is found from the next ``learn`` or ``info`` on. Not to be
    shared between threads.
    """

    def __init__(self, ledger: HistoryFile) -> None:
        self._ledger = ledger
        self._log: list[bytes] | None = None  # the ledger's, once it is indexed up to ``_seen``
        self._fresh, self._fresh_text = RunTrie(LONGEST), list[int]()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        fingerprint: str,
        vocabulary: int,
        limit_tokens: int | None = None,
        create: bool = True,
    ) -> History:
        """The habits in ``path``, read whole; an empty file of mode 0600 is made where there is none, unless not ``create``.

        Args:
            path: one file for each tokenizer.
            fingerprint: of the tokenizer (``adi.model.tokenizer.tokenizer_fingerprint``).
            vocabulary: ids lie in [0, vocabulary).
            limit_tokens: most tokens kept, 1 to 4,194,304; None for what the file says, 262,144 in a new one. Another
                number than the file's becomes the file's, and where it is smaller the oldest sequences go at once.

        Raises:
            ValueError: a file of another tokenizer or vocabulary, a foreign or damaged file, one that cannot be used. A last
                record that a crash cut off is no damage.
        """
        place = expanded(path).resolve()
        header = Header(fingerprint, vocabulary, LIMIT_TOKENS if limit_tokens is None else limit_tokens)
        ledger = HistoryFile(place, header)
        ledger.load(create, limit_tokens)
        return cls(ledger)

    @classmethod
    def look(cls, path: str | os.PathLike[str]) -> History:
        """The habits in an existing file, whichever tokenizer's they are: to show and to prune them."""
        header = read_header(expanded(path).resolve())
        return cls.open(path, fingerprint=header.fingerprint, vocabulary=header.vocabulary, create=False)

    def find(self, text: Sequence[int], most: int) -> NgramMatch | None:
        """Up to ``most`` tokens that followed the longest run of the last tokens of ``text`` in any sequence.

        Runs of 8 tokens down to 2 are looked for, the most recent of equally long ones wins, and what it gives ends with
        its sequence. None where there is no such run. The first call sorts everything: 0.13 s
        for 262,144 tokens on a desktop core; a call takes less than 0.1 ms.
        """
        if most < 1:
            return None
        index = self._index()
        matched, start, stop = index.find(text)
        fresh, at = self._fresh.find(self._fresh_text, text)
        if fresh >= max(matched, SHORTEST):
            after = self._fresh_text[at : at + most]
            return NgramMatch(tuple(itertools.takewhile(lambda token: token != BORDER, after)), fresh, "habits")
        return NgramMatch(index.tokens(start, min(stop, start + most)), matched, "habits") if matched else None

    def _index(self) -> RunArray:
        """The sorted index, with all that was learned since in the small one beside it."""
        log = self._ledger.log
        if self._log is not log or len(self._fresh_text) > FRESH_TOKENS:
            self._sorted = RunArray([_ids(data) for data in self._ledger.order], LONGEST, SHORTEST)
            self._fresh, self._fresh_text = RunTrie(LONGEST), []
            self._log, self._seen = log, len(log)
        # A sequence that was moved is in both by now; the fresh one is asked first, so where it stood does not matter.
        while self._seen < len(log):
            begin = len(self._fresh_text) + 1
            self._fresh_text += [BORDER, *_ids(log[self._seen]).tolist()]
            for end in range(begin + SHORTEST, len(self._fresh_text)):
                self._fresh.add(self._fresh_text, end)
            self._seen += 1
        return self._sorted

    def learn(self, ids: Sequence[int]) -> None:
        """Append one finished sequence; one that is there already becomes the newest.

        Where the limit is passed the oldest sequences go, until an eighth of it is free. Of a sequence longer than the
        limit the end is kept; one of two tokens or fewer could never be found, and is not. ValueError for ids outside the
        vocabulary and for a file that cannot be written.
        """
        import numpy as np

        vocabulary = self._ledger.header.vocabulary
        tokens = [operator.index(i) for i in ids]
        if (bad := next((i for i in tokens if not 0 <= i < vocabulary), None)) is not None:
            raise AdiError(f"token id {bad} is outside the vocabulary [0, {vocabulary}).")
        if len(tokens) > SHORTEST:
            self._ledger.append(np.array(tokens, "<u4").tobytes())

    def newest(self, count: int) -> list[tuple[int, ...]]:
        """The last ``count`` sequences, the newest first."""
        return [tuple(_ids(data).tolist()) for data in itertools.islice(reversed(self._ledger.order), count)]

    def prune(self, keep_tokens: int) -> None:
        """Drop the oldest sequences until at most ``keep_tokens`` tokens are left."""
        if keep_tokens < 0:
            raise AdiError(f"keep_tokens is {keep_tokens}; it must be at least 0.")
        self._ledger.keep(keep_tokens)

    def forget(self) -> None:
        """Drop everything; the file stays, empty."""
        self.prune(0)

    def info(self) -> HistoryInfo:
        """What the file holds now, other processes' sequences included."""
        size = self._ledger.refresh()
        ledger, header = self._ledger, self._ledger.header
        counts = (len(ledger.order), ledger.tokens, size)
        return HistoryInfo(ledger.path, *counts, header.limit_tokens, header.vocabulary, header.fingerprint)


def _ids(data: bytes) -> Ids:
    import numpy as np

    assert len(data) % WORD == 0, "the ledger gives whole ids"
    return np.frombuffer(data, "<u4").astype(np.int32)
