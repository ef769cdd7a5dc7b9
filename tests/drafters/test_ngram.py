"""The memory of a text against a slow twin that scans it, and the sorted one against the one that grows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adi.drafters.ngram import NgramIndex, NgramMatch, RunArray, RunTrie
from adi.drafters.ngram import _order as order_of

TOKENS = st.lists(st.integers(0, 2), min_size=40, max_size=40)


def rescanned(text: list[int], longest: int, most: int) -> NgramMatch | None:
    """What ``NgramIndex`` gives, by looking through the whole text every time."""
    for size in range(min(longest, len(text)), 0, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:] and most > 0:
                grown = list(text)
                for at in range(start + size, start + size + most):
                    grown.append(grown[at])
                return NgramMatch(tuple(grown[len(text) :]), size, "context")
    return None


@given(TOKENS, st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 9), st.integers(0, 7))
def test_the_memory_is_a_rescan_of_the_text(tokens, lengths, longest, most) -> None:
    ngrams = NgramIndex(longest)
    for length in sorted(lengths):
        assert ngrams.find(tokens[:length], most) == rescanned(tokens[:length], longest, most)


def test_the_most_recent_of_the_longest_runs_goes_on() -> None:
    assert NgramIndex().find([1, 2, 7, 1, 2, 8, 9, 1, 2], 2) == NgramMatch((8, 9), 2, "context")
    assert NgramIndex().find([5, 1, 2, 7, 4, 1, 2, 8, 5, 1, 2], 2) == NgramMatch((7, 4), 3, "context"), (
        "longer, though less recent"
    )
    assert NgramIndex(2).find([1, 2, 1, 2], 5) == NgramMatch((1, 2, 1, 2, 1), 2, "context"), "a copy may overlap what it makes"
    assert NgramIndex().find([1, 2, 3], 5) is None
    assert NgramIndex().find([1, 1, 1], 0) is None


def test_large_ids_are_not_mixed_up() -> None:
    top = (1 << 32) - 1
    assert NgramIndex().find([top, 0, 3, 0, top, 4, top, 0], 1) == NgramMatch((3,), 2, "context")


class Counting(list[int]):
    """A list that counts how often it is read."""

    reads = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.reads += 1
        return super().__getitem__(index)


def test_a_step_costs_the_same_in_a_long_text() -> None:
    costs = []
    for length in (300, 30_000):
        text = Counting([1, 2, 3, 4, 5] * (length // 5))
        ngrams = NgramIndex()
        ngrams.find(text, 4)
        text.append(1)
        text.reads = 0
        ngrams.find(text, 4)
        costs.append(text.reads)
    assert costs[0] == costs[1] < 40


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=6), st.lists(st.integers(0, 2), max_size=10), st.integers(1, 9)
)
def test_the_sorted_runs_find_what_the_growing_ones_find(sequences, query, longest) -> None:
    border = 99
    grown, text, stops = RunTrie(longest), [], []
    for sequence in sequences:
        begin = len(text) + 1
        text += [border, *sequence]
        stops += [len(text)] * (len(text) - begin + 1)
        for end in range(begin + 1, len(text)):
            grown.add(text, end)
    index = RunArray([np.array(s, np.int32) for s in sequences], longest, shortest=1)
    matched, start, stop = index.find(query)
    expected, at = grown.find(text, query)
    assert matched == expected
    if matched:
        assert index.tokens(start, stop) == tuple(text[at : stops[at]])


@given(st.data())
def test_the_order_is_what_lexsort_gives(data: st.DataObject) -> None:
    top = data.draw(st.sampled_from([0, 1, 2, 300, 70_000, 2**31 - 2]))
    ids = st.integers(-1, top)
    rows, width = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 9))
    columns = [np.array(data.draw(st.lists(ids, min_size=rows, max_size=rows)), np.int32) for _ in range(width)]
    assert order_of(columns).tolist() == np.lexsort(columns[::-1]).tolist()


def voted(
    sequences: list[list[int]], query: list[int], longest: int, shortest: int, most: int
) -> tuple[int, list[int], list[float]]:
    """What ``vote`` gives, by looking at every place of every sequence."""

    def places(size: int) -> list[tuple[int, int]]:
        """Sequence and position after each place where the last ``size`` tokens stand, the most recent first."""
        met = [
            (i, end)
            for i, sequence in enumerate(sequences)
            for end in range(max(size, shortest), len(sequence))
            if sequence[end - size : end] == query[len(query) - size :]
        ]
        return met[::-1]

    def counted(where: list[tuple[int, int]], doubt: float) -> dict[int, float]:
        said = [sequences[i][end] for i, end in where]
        return {token: said.count(token) / (len(said) + doubt) for token in dict.fromkeys(said)}

    sizes = [size for size in range(1, min(longest, len(query)) + 1) if places(size)]
    if len(sizes) < shortest:
        return 0, [], []
    where = places(len(sizes))
    votes = counted(where, 2)
    if len(where) < 8 and len(sizes) > shortest:
        more = places(next((size for size in range(len(sizes) - 1, shortest, -1) if len(places(size)) >= 8), shortest))
        for token, share in counted(more, 0).items():
            votes[token] = votes.get(token, 0) + 2 / (len(where) + 2) * share
        if max(votes, key=votes.__getitem__) not in {sequences[i][end] for i, end in where}:
            where = more
    tokens, shares = [max(votes, key=votes.__getitem__)], [max(votes.values())]
    while len(tokens) < most:
        where = [(i, end + 1) for i, end in where if sequences[i][end] == tokens[-1] and end + 1 < len(sequences[i])]
        if not where:
            break
        votes = counted(where, 1)
        tokens.append(max(votes, key=votes.__getitem__))
        shares.append(votes[tokens[-1]])
    return len(sizes), tokens, shares


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=14), max_size=8),
    st.lists(st.integers(0, 2), max_size=10),
    st.integers(2, 9),
    st.integers(1, 5),
)
def test_the_vote_is_that_of_all_places(sequences, query, longest, most) -> None:
    index = RunArray([np.array(s, np.int32) for s in sequences], longest, shortest=2)
    matched, tokens, shares = index.vote(query, most)
    expected = voted(sequences, query, longest, 2, most)
    assert (matched, list(tokens)) == expected[:2]
    assert list(shares) == pytest.approx(expected[2])


def test_the_many_outvote_the_latest() -> None:
    sequences = [[1, 2, 5, 6]] * 9 + [[1, 2, 7, 8]]
    index = RunArray([np.array(s, np.int32) for s in sequences], 4, shortest=2)
    assert index.tokens(*index.find([1, 2])[1:]) == (7, 8), "the latest"
    assert index.vote([1, 2], 3) == (2, (5, 6), pytest.approx((0.75, 0.9)))
    many = RunArray([np.array([1, 2, 5 + i % 3, 9], np.int32) for i in range(1000)], 4, shortest=2)
    assert many.vote([1, 2], 1)[2][0] == pytest.approx(1 / 3, abs=0.02), "some of a thousand places tell enough"


def test_a_run_has_a_length() -> None:
    with pytest.raises(ValueError, match="longest is 0; it must be a whole number of at least 1"):
        NgramIndex(0)
