"""Habits: what is learned is found, in any process; the file is bounded, private, and refused where it is not ours."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adi.drafters import history as module
from adi.drafters.history import History
from adi.drafters.ngram import NgramMatch

OURS = {"fingerprint": "ours", "vocabulary": 100}
SEQUENCE = st.lists(st.integers(0, 2), min_size=3, max_size=14)


def scanned(sequences: list[list[int]], query: list[int], most: int) -> NgramMatch | None:
    """What ``find`` gives, by looking through every sequence, the newest and its end first."""
    for size in range(min(8, len(query)), 1, -1):
        for sequence in reversed(sequences):
            for end in range(len(sequence) - 1, size - 1, -1):
                if sequence[end - size : end] == query[-size:] and most > 0:
                    return NgramMatch(tuple(sequence[end : end + most]), size, "habits")
    return None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "habits"


def content(path: Path) -> list[tuple[int, ...]]:
    return History.look(path).newest(10**6)[::-1]


@given(
    st.lists(SEQUENCE, max_size=8),
    st.lists(SEQUENCE, max_size=4),
    st.lists(SEQUENCE, min_size=1, max_size=4),
    st.integers(0, 5),
)
def test_it_finds_what_a_scan_finds(tmp_path_factory, before, after, queries, most) -> None:
    path = tmp_path_factory.mktemp("h") / "habits"
    first = History.open(path, **OURS)
    for ids in before:
        first.learn(ids)
    second, twin = History.open(path, **OURS), list[list[int]]()
    for i, ids in enumerate([*before, *after]):
        twin = [*(other for other in twin if other != ids), ids]
        if i >= len(before):
            second.find(ids, 1)  # so that some are sorted and some are beside them
            second.learn(ids)
    for query in queries:
        assert second.find(query, most) == scanned(twin, query, most)
    assert content(path) == [tuple(ids) for ids in twin]
    assert History.open(path, **OURS).find(queries[0], most) == scanned(twin, queries[0], most)


def test_the_fresh_ones_are_sorted_in_when_they_are_many(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRESH_TOKENS", 10)
    known = History.open(path, **OURS)
    for start in range(0, 90, 6):
        known.learn(range(start, start + 6))
        assert known.find([start, start + 1, start + 2], 9) == NgramMatch((start + 3, start + 4, start + 5), 3, "habits")
        assert known.find([0, 1], 2) == NgramMatch((2, 3), 2, "habits")


def test_a_file_is_private_and_says_what_it_holds(path: Path) -> None:
    known = History.open(path, **OURS, limit_tokens=50)
    known.learn([1, 2, 3, 4])
    known.learn([1, 2])  # too short to be found by two tokens
    info = known.info()
    assert (info.path, info.sequences, info.tokens, info.limit_tokens) == (path, 1, 4, 50)
    assert (info.fingerprint, info.vocabulary, info.bytes) == ("ours", 100, path.stat().st_size)
    known.prune(4)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["habits"]
    known.forget()
    assert known.find([1, 2], 3) is None
    assert content(path) == []


def test_the_oldest_goes_first(path: Path) -> None:
    known = History.open(path, **OURS, limit_tokens=40)
    for i in range(0, 40, 4):
        known.learn([i, i + 1, i + 2, i + 3])
    assert known.info().tokens == 40
    known.learn([0, 1, 2, 3])  # again: now the newest
    assert known.info().tokens == 40
    known.learn([50, 51, 52, 53])
    assert content(path)[0] == (16, 17, 18, 19), "the limit less an eighth of it is left"
    assert content(path)[-2:] == [(0, 1, 2, 3), (50, 51, 52, 53)]
    assert known.find([4, 5], 1) is None
    assert known.find([0, 1], 1) == NgramMatch((2,), 2, "habits")
    known.prune(8)
    assert content(path) == [(0, 1, 2, 3), (50, 51, 52, 53)]
    known.learn(list(range(99)))
    assert content(path) == [tuple(range(59, 99))], "the end of one that is longer than all"


def test_repetition_is_bounded_too(path: Path) -> None:
    known = History.open(path, **OURS, limit_tokens=9)
    for i in range(600):
        known.learn([i % 2, 5, 6])
    assert path.stat().st_size <= 4096 + 16 * 9
    assert content(path) == [(0, 5, 6), (1, 5, 6)]
    size = path.stat().st_size
    known.learn([1, 5, 6])
    assert path.stat().st_size == size, "the newest need not be moved"


def test_another_limit_is_taken_on(path: Path) -> None:
    known = History.open(path, **OURS, limit_tokens=40)
    known.learn([1, 2, 3, 4])
    known.learn([5, 6, 7, 8])
    History.open(path, **OURS, limit_tokens=6)
    assert History.open(path, **OURS).info().limit_tokens == 6
    known.learn([7, 8, 9])
    assert content(path) == [(7, 8, 9)]


def _learn(path: Path, own: int, limit: int | None, start: Any) -> None:
    known = History.open(path, fingerprint="ours", vocabulary=10_000, limit_tokens=limit)
    for i in range(400):
        if i % 50 == 0:
            start.wait(60)
        known.learn([own, i, own, i + 1, *range(i % 7)])


@pytest.mark.parametrize("limit", [None, 500])
def test_processes_that_learn_at_once_lose_nothing(path: Path, limit: int | None) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    workers = [context.Process(target=_learn, args=(path, own, limit, start)) for own in (5001, 5002)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    held = content(path)
    for own in (5001, 5002):
        seen = [ids[1] for ids in held if ids[0] == own]
        assert seen == list(range(400 - len(seen), 400)), "in order, and where some had to go the newest"
    if limit is None:
        assert len(held) == 800
        assert sum(a[0] != b[0] for a, b in itertools.pairwise(held)) > 1, "they take turns, at every 50 at least"
    else:
        assert 0 < sum(map(len, held)) <= limit


def test_what_another_process_did_is_seen_with_the_next_step(path: Path) -> None:
    one, two = History.open(path, **OURS), History.open(path, **OURS)
    one.learn([1, 2, 3])
    two.learn([4, 5, 6])
    assert two.find([1, 2], 5) == NgramMatch((3,), 2, "habits")
    one.forget()
    two.learn([7, 8, 9])
    assert two.find([1, 2], 5) is None
    path.unlink()
    two.learn([4, 5, 6])
    assert content(path) == [(4, 5, 6)]


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_record_that_was_cut_off_is_dropped(path: Path, cut: int) -> None:
    known = History.open(path, **OURS)
    known.learn([1, 2, 3])
    known.learn([4, 5, 6])
    os.truncate(path, path.stat().st_size - cut)
    again = History.open(path, **OURS)
    assert content(path) == [(1, 2, 3)]
    (known if cut % 2 else again).learn([7, 8, 9])
    assert content(path) == [(1, 2, 3), (7, 8, 9)]


@given(st.integers(0, 400), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(tmp_path_factory, at, flip) -> None:
    path = tmp_path_factory.mktemp("h") / "habits"
    known = History.open(path, **OURS)
    for ids in ([1, 2, 3], [4, 5, 6], [1, 2, 3], [7, 8, 9]):
        known.learn(ids)
    data = bytearray(path.read_bytes())
    whole, at = content(path), at % len(data)
    data[at] ^= flip
    path.write_bytes(data)
    try:
        changed = History.open(path, **OURS)
    except ValueError:
        return
    left = changed.newest(9)[::-1]
    in_edition = at < data.index(b"\n")
    assert left == (whole if in_edition else whole[:-1]), "only the last record may be taken for one that was cut off"


def record(count: int, *words: int) -> bytes:
    body = struct.pack(f"<{len(words)}I", *words)
    head = struct.pack("<II", count, zlib.crc32(body))
    return head + struct.pack("<I", zlib.crc32(head)) + body


STATED = {"adi_habits": 1, "fingerprint": "ours", "vocabulary": 100, "limit_tokens": 10, "edition": "0"}
LINE = json.dumps(STATED).encode() + b"\n"
DAMAGE = {
    "foreign": (b"#!/bin/sh\n", "is not a habits file"),
    "pickle": (b"\x80\x04\x95.\n", "is not a habits file"),
    "json": (b"[1]\n", "is not a habits file"),
    "nested": (b"[" * 4000, "is not a habits file"),
    "no line": (LINE[:-1], "is not a habits file"),
    "newer": (LINE.replace(b": 1,", b": 2,", 1), "format 2; this version of adi reads 1"),
    "lacks": (b'{"adi_habits": 1}\n', "damaged: its first line"),
    "kind": (LINE.replace(b"100", b"true"), "damaged: its first line"),
    "limit": (LINE.replace(b"10,", b"-1,"), "damaged: limit_tokens is -1"),
    "spelling": (LINE.replace(b": ", b":"), "damaged: its first line"),
    "zeros": (LINE + bytes(64), "no record begins at byte 0"),
    "changed": (LINE + record(3, 1, 2, 3)[:-1] + b"\1" + record(3, 1, 2, 3), "the record at byte 0 .* has changed"),
    "vocabulary": (LINE + record(3, 1, 2, 100), "token id 100 is outside the vocabulary"),
    "repeats": (LINE + record(0, 3), "repeats sequence 3, but holds 0"),
    "too many": (LINE + record(11, *range(11)), "11 tokens, but 10 are its limit"),
    "oversized": (LINE + bytes(5000), "more bytes than 10 tokens"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_what_is_damaged_or_foreign_is_refused(path: Path, name: str) -> None:
    data, complaint = DAMAGE[name]
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=complaint) as caught:
        History.open(path, **OURS)
    assert str(path) in str(caught.value)
    assert "elete it" in str(caught.value), "every one says what to do"
    assert path.read_bytes() == data


def test_another_tokenizers_file_is_refused(path: Path) -> None:
    History.open(path, **OURS)
    with pytest.raises(ValueError, match=r"another tokenizer \(fingerprint ours, not theirs\).* file of its own"):
        History.open(path, fingerprint="theirs", vocabulary=100)
    with pytest.raises(ValueError, match="vocabulary of 100 tokens, not 101"):
        History.open(path, fingerprint="ours", vocabulary=101)


def test_what_cannot_be_meant_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot use the habits file"):
        History.open(path, **OURS, create=False)
    for place in (tmp_path, Path("/dev/null")):
        with pytest.raises(ValueError, match=r"not a file|cannot use"):
            History.open(place, **OURS)
    with pytest.raises(ValueError, match="limit_tokens is 0; choose 1 to"):
        History.open(path, **OURS, limit_tokens=0)
    known = History.open(path, **OURS)
    for bad in (100, -1):
        with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 100\)"):
            known.learn([1, 2, 3, bad])
    with pytest.raises(ValueError, match="keep_tokens is -1"):
        known.prune(-1)
