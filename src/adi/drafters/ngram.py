"""N-gram drafting: what followed the last tokens at an earlier occurrence, at no cost in blocks.

``NgramIndex`` looks in the text that is being decoded (prompt lookup, Saxena 2023); a history or a datastore in other texts
(REST, He et al. 2023). Both rest on ``RunTrie``, which grows by a token at a time, and ``RunArray``, a suffix array that is
sorted once, for many tokens. A run is an n-gram of any length up to ``longest``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adi.arguments import whole

if TYPE_CHECKING:
    import numpy as np

    Ids = np.ndarray[Any, np.dtype[np.int32]]

LONGEST = 8
VOTERS = 128  # most occurrences that vote
FEW = 8  # occurrences of a run, below which a shorter run votes as well
DOUBT = 2.0  # votes for no token at all, so that few occurrences give small shares
NODE_SHIFT = 32  # a token id takes no more bits than that
ROOT = 0


@dataclass(frozen=True)
class NgramMatch:
    """A draft found by n-gram lookup.

    ``tokens`` is the continuation, ``matched`` the length of the run that was found (at most ``longest``), ``source`` where:
    "context", "history", "habits", "datastore". ``shares``, where occurrences voted, holds for each token the share of those
    that continue with it.
    """

    tokens: tuple[int, ...]
    matched: int
    source: str
    shares: tuple[float, ...] = ()


class RunTrie:
    """The most recent occurrence of every run of up to ``longest`` tokens; the text itself stays the caller's.

    A trie of the runs read backwards, so that the deepest node on the way back from the end is the longest match, and
    a lookup or an insertion hashes one number per token. A node with one occurrence has no children yet: the text at that
    place is read instead. So a token of new text costs two or three nodes and a repeated one at most ``longest``.
    Ids lie in [0, 2**32).
    """

    def __init__(self, longest: int) -> None:
        self._longest = whole("longest", longest, 1)
        self._child: dict[int, int] = {}
        self._last = [0]  # of every node: the position after its most recent occurrence
        self._lone = [False]  # of every node: whether it has one occurrence, so no children yet

    def add(self, text: Sequence[int], end: int) -> None:
        """Insert the runs of ``text`` that end before position ``end`` (at least 1). Later calls are the more recent ones."""
        node, most = ROOT, min(self._longest, end)
        for depth in range(1, most + 1):
            key = node << NODE_SHIFT | text[end - depth]
            child = self._child.get(key)
            if child is None:
                self._grow(key, end)
                return
            before, self._last[child] = self._last[child], end
            if self._lone[child]:
                self._lone[child] = False
                if depth < min(self._longest, before):
                    self._grow(child << NODE_SHIFT | text[before - depth - 1], before)
            node = child

    def _grow(self, key: int, end: int) -> None:
        self._child[key] = len(self._last)
        self._last.append(end)
        self._lone.append(True)

    def find(self, text: Sequence[int], query: Sequence[int]) -> tuple[int, int]:
        """The length of the longest run at the end of ``query`` that occurs in ``text``, and the position after its most recent
        occurrence.

        (0, 0) where not even the last token does. ``text`` is the one that was given to ``add``.
        """
        node, depth, most = ROOT, 0, min(self._longest, len(query))
        while depth < most and (child := self._child.get(node << NODE_SHIFT | query[-1 - depth])) is not None:
            node, depth = child, depth + 1
        at = self._last[node]
        if self._lone[node]:
            while depth < min(most, at) and text[at - depth - 1] == query[-1 - depth]:
                depth += 1
        return depth, at


class NgramIndex:
    """Prompt lookup in a text that only grows (Saxena 2023)."""

    def __init__(self, longest: int = LONGEST) -> None:
        self._runs = RunTrie(longest)
        self._known = 1

    def find(self, text: Sequence[int], most: int) -> NgramMatch | None:
        """``most`` tokens that followed the most recent earlier occurrence of the longest run of the last tokens.

        The copy may overlap the draft: "a b a b" continues as long as ``most`` asks for. None where the last token is new
        or ``most`` is below 1. ``text`` is the text of the call before, or a longer one that
        begins with it; the work is in its new tokens, not in its length.
        """
        for end in range(self._known, len(text)):  # the run that ends the text has no continuation yet
            self._runs.add(text, end)
        self._known = max(self._known, len(text))
        matched, start = self._runs.find(text, text)
        if not matched or most < 1:
            return None
        period = text[start : start + most]
        return NgramMatch(tuple(period[i % len(period)] for i in range(most)), matched, "context")


class RunArray:
    """Where the runs of a fixed set of sequences occur: their contexts sorted, the last token first.

    A suffix array (Manber and Myers 1990) of depth ``longest``, read backwards; no run crosses from one sequence into the
    next. It takes 4 * (longest + 3) bytes per token, and ids in [0, 2**31 - 1).
    """

    def __init__(self, sequences: Sequence[Ids], longest: int = LONGEST, shortest: int = 2, places: Ids | None = None) -> None:
        """``places``: those of an earlier array of the same sequences and lengths, so that nothing is sorted."""
        import numpy as np

        lengths = np.array([len(s) for s in sequences], dtype=np.int64)
        text: Ids = np.concatenate([*sequences, np.zeros(0, np.int32)])
        stops = np.repeat(lengths.cumsum(), lengths).astype(np.int32)
        offsets = np.arange(len(text)) - (stops - np.repeat(lengths, lengths))
        found = np.flatnonzero(offsets >= shortest) if places is None else places  # with enough before them to be found
        # Column d holds the token d + 1 back; before the start of a sequence -1, which no query holds.
        back = [np.where(offsets[found] > d, text[np.maximum(found - d - 1, 0)], np.int32(-1)) for d in range(longest)]
        if places is None:
            order = _order(back)
            found, back = found[order].astype(np.int32), [column[order] for column in back]
        # Views, not arrays: a lookup reads single numbers, which cost ten times as much from an array.
        self._text, self._stops = text.data, stops.data
        self._columns = [column.data for column in back]
        self.places, self._places = found, found.data
        self._shortest = shortest

    def find(self, query: Sequence[int]) -> tuple[int, int, int]:
        """How many of the last tokens of ``query`` matched, the position after them, and where its sequence stops.

        (0, 0, 0) where fewer than ``shortest`` did. Positions count through all sequences, one after the other.
        """
        import numpy as np

        ranges = self._ranges(query)
        if len(ranges) < self._shortest:
            return 0, 0, 0
        at = int(np.asarray(self._places[slice(*ranges[-1])]).max())
        return len(ranges), at, self._stops[at]

    def _ranges(self, query: Sequence[int]) -> list[tuple[int, int]]:
        """The ranges of the sorted order that hold the last token, the last two and so on, as long as they occur."""
        low, high, found = 0, len(self._places), list[tuple[int, int]]()
        for column, token in zip(self._columns, query[: -len(self._columns) - 1 : -1], strict=False):
            low = bisect_left(column, token, low, high)
            high = bisect_right(column, token, low, high)
            if low == high:
                break
            found.append((low, high))
        return found

    def vote(self, query: Sequence[int], most: int) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
        """How many of the last tokens of ``query`` matched; up to ``most`` tokens, each the most frequent continuation; and
        each token's share of the occurrences, less some for doubt.

        Where a run has few occurrences, those of a shorter one vote as well, as in prediction by partial matching (Cleary
        and Witten 1984). Of tokens with as many votes the most recent wins. Of a run with very many occurrences a sample
        votes. (0, (), ()) where fewer than ``shortest`` tokens matched.
        """
        ranges = self._ranges(query)
        if len(ranges) < self._shortest:
            return 0, (), ()
        text, stops = self._text, self._stops
        places, votes = self._first_votes(ranges)
        tokens, shares = list[int](), list[float]()
        while votes:
            token = max(votes, key=votes.__getitem__)
            tokens.append(token)
            shares.append(votes[token])
            places = [place for place in places if text[place] == token]
            if len(tokens) == most or len(places) == 1:
                break
            places = [place + 1 for place in places if place + 1 < stops[place]]
            votes = self._votes(places, DOUBT / 2)
        if votes and len(places) == 1:  # one occurrence is left: its continuation is the draft
            at = places[0] + 1
            rest = self.tokens(at, min(stops[at - 1], at + most - len(tokens)))
            return len(ranges), (*tokens, *rest), (*shares, *[1 / (1 + DOUBT / 2)] * len(rest))
        return len(ranges), tuple(tokens), tuple(shares)

    def _first_votes(self, ranges: Sequence[tuple[int, int]]) -> tuple[list[int], dict[int, float]]:
        """The occurrences from which the continuation is read, and the votes for its first token."""
        places = self._some(*ranges[-1])
        votes = self._votes(places, DOUBT)
        if len(places) >= FEW or len(ranges) == self._shortest:
            return places, votes
        wider = ranges[self._shortest - 1 : -1]
        more = self._some(*next((r for r in reversed(wider) if r[1] - r[0] >= FEW), wider[0]))
        left = DOUBT / (len(places) + DOUBT)
        own = set(votes)
        for token, share in self._votes(more, 0.0).items():
            votes[token] = votes.get(token, 0.0) + left * share
        return (places if max(votes, key=votes.__getitem__) in own else more), votes

    def _some(self, low: int, high: int) -> list[int]:
        """Occurrences in this range of the sorted order, at most ``VOTERS``, the most recent first."""
        return sorted(self._places[low : high : -(-(high - low) // VOTERS)], reverse=True)

    def _votes(self, places: Sequence[int], doubt: float) -> dict[int, float]:
        """The share of each token at these places, as if there were ``doubt`` more of them, in their order."""
        text, counts = self._text, dict[int, int]()
        for place in places:
            token = text[place]
            counts[token] = counts.get(token, 0) + 1
        voters = len(places) + doubt
        return {token: count / voters for token, count in counts.items()}

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """The tokens from position ``start`` to ``stop``."""
        return tuple(self._text[start:stop])


def _order(columns: Sequence[Ids]) -> Any:
    """What sorts rows by these columns, the first one first; equal rows stay in their order. ``numpy.lexsort`` in half to two
    thirds of its time: as many ids as fit make one number, and few rows are alike in the first of these."""
    import numpy as np

    if not len(columns[0]):
        return np.zeros(0, np.int64)
    bits = (max(int(column.max()) for column in columns) + 1).bit_length() or 1
    keys = []
    for at in range(0, len(columns), 64 // bits):
        key = np.zeros(len(columns[0]), np.uint64)
        for column in columns[at : at + 64 // bits]:
            key <<= np.uint64(bits)
            key |= (column + 1).astype(np.uint64)
        keys.append(key)
    order = keys[0].argsort()
    first = keys[0][order]
    alike = first[1:] == first[:-1]
    tied = np.append(alike, False) | np.append(False, alike)
    rows = np.sort(order[tied])
    order[tied] = rows[np.lexsort([key[rows] for key in keys[::-1]])]
    return order
