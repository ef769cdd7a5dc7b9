"""History: what is learned is found, in any process; the file is bounded, private, and refused where it is not ours."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sqlite3
import struct
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adi.drafters import history as module
from adi.drafters.history import History
from adi.drafters.ngram import NgramMatch
from damage import only_value_errors

OURS = {"fingerprint": "ours", "vocabulary": 100}
SEQUENCE = st.lists(st.integers(0, 2), min_size=3, max_size=14)


def scanned(sequences: list[list[int]], query: list[int], most: int) -> NgramMatch | None:
    """What ``find`` gives, by looking through every sequence, the newest and its end first."""
    for size in range(min(8, len(query)), 1, -1):
        for sequence in reversed(sequences):
            for end in range(len(sequence) - 1, size - 1, -1):
                if sequence[end - size : end] == query[-size:] and most > 0:
                    return NgramMatch(tuple(sequence[end : end + most]), size, "history")
    return None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "history"


def content(path: Path) -> list[tuple[int, ...]]:
    return History.look(path).newest(10**6)[::-1]


@given(
    st.lists(SEQUENCE, max_size=8),
    st.lists(SEQUENCE, max_size=4),
    st.lists(SEQUENCE, min_size=1, max_size=4),
    st.integers(0, 5),
)
def test_it_finds_what_a_scan_finds(tmp_path_factory, before, after, queries, most) -> None:
    path = tmp_path_factory.mktemp("h") / "history"
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
        assert known.find([start, start + 1, start + 2], 9) == NgramMatch((start + 3, start + 4, start + 5), 3, "history")
        assert known.find([0, 1], 2) == NgramMatch((2, 3), 2, "history")


def test_a_file_is_private_and_says_what_it_holds(path: Path) -> None:
    known = History.open(path, **OURS, limit_tokens=50)
    known.learn([1, 2, 3, 4])
    known.learn([1, 2])  # too short to be found by two tokens
    info = known.info()
    assert (info.path, info.sequences, info.tokens, info.limit_tokens) == (path, 1, 4, 50)
    assert (info.fingerprint, info.vocabulary, info.bytes) == ("ours", 100, path.stat().st_size)
    known.prune(4)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["history"]
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
    assert known.find([0, 1], 1) == NgramMatch((2,), 2, "history")
    known.prune(8)
    assert content(path) == [(0, 1, 2, 3), (50, 51, 52, 53)]
    known.learn(list(range(99)))
    assert content(path) == [tuple(range(59, 99))], "the end of one that is longer than all"


def test_repetition_is_bounded_too(path: Path) -> None:
    known = History.open(path, **OURS, limit_tokens=9)
    for i in range(600):
        known.learn([i % 2, 5, 6])
    assert path.stat().st_size <= 32 << 10
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
    assert two.find([1, 2], 5) == NgramMatch((3,), 2, "history")
    one.forget()
    two.learn([7, 8, 9])
    assert two.find([1, 2], 5) is None
    path.unlink()
    two.learn([4, 5, 6])
    assert content(path) == [(4, 5, 6)]


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_does_no_harm(tmp_path_factory, at, flip) -> None:
    """What is left are sequences of this vocabulary: at worst drafts that full depth rejects."""
    path = tmp_path_factory.mktemp("h") / "history"
    known = History.open(path, **OURS)
    for ids in ([1, 2, 3], [4, 5, 6], [1, 2, 3], [7, 8, 9]):
        known.learn(ids)
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= flip
    path.write_bytes(data)

    def used() -> History:
        changed = History.open(path, **OURS)
        changed.find([1, 2], 3)
        changed.learn([1, 2, 3, 4])
        return changed

    changed = only_value_errors(used)
    if changed is not None:
        assert all(0 <= i < 100 for ids in changed.newest(99) for i in ids)
        assert changed.newest(1) == [(1, 2, 3, 4)]


@pytest.mark.parametrize("at", ["connect", "write", "commit"])
def test_a_process_that_dies_while_it_learns_loses_only_that(path: Path, at: str) -> None:
    History.open(path, **OURS).learn([1, 2, 3])
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=_die, args=(path, at))
    worker.start()
    worker.join()
    assert worker.exitcode == 9
    assert content(path) == [(1, 2, 3)]
    History.open(path, **OURS).learn([7, 8, 9])
    assert content(path) == [(1, 2, 3), (7, 8, 9)]
    assert [p.name for p in path.parent.iterdir()] == ["history"]


def test_a_sequence_that_could_not_be_written_is_not_remembered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.01)
    known = History.open(path, **OURS)
    known.learn([1, 2, 3])
    known.learn([4, 5, 6])
    with closing(sqlite3.connect(path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM sequences").fetchone()  # a reader blocks the commit
        with pytest.raises(ValueError, match=r"cannot use the history .*locked"):
            known.learn([1, 2, 3])
    known.learn([1, 2, 3])
    assert content(path) == [(4, 5, 6), (1, 2, 3)]


def _die(path: Path, at: str) -> None:
    """Leave in the middle of a transaction, with more written than SQLite's cache of one page holds."""
    database = sqlite3.connect(path, isolation_level=None)
    if at != "connect":
        database.execute("PRAGMA cache_size = 1")
        database.execute("BEGIN IMMEDIATE")
        for i in range(50 if at == "write" else 5000):
            database.execute("INSERT INTO sequences (ids) VALUES (?)", (bytes(4 * (i % 9 + 3)),))
    os._exit(9)


def record(count: int, *words: int) -> bytes:
    body = struct.pack(f"<{len(words)}I", *words)
    head = struct.pack("<II", count, zlib.crc32(body))
    return head + struct.pack("<I", zlib.crc32(head)) + body


STATED = {"adi_habits": 1, "fingerprint": "ours", "vocabulary": 100, "limit_tokens": 10, "edition": "0"}
LINE = json.dumps(STATED).encode() + b"\n"
OLD = LINE + record(3, 1, 2, 3) + record(3, 4, 5, 6) + record(0, 0)  # the first one again, which is now the newest


@pytest.mark.parametrize("rest", [b"", record(3, 7, 8, 9)[:-1], record(3, 7, 8, 9)[:14], record(0, 1)[:-2], b"\1\2"])
def test_a_file_of_the_old_format_is_converted_once(path: Path, rest: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """A last record that a crash cut off is dropped."""
    path.parent.mkdir()
    path.write_bytes(OLD + rest)
    with caplog.at_level("WARNING"):
        known = History.open(path, **OURS)
    assert [r.message for r in caplog.records] == [f"{path}: converted to the new format of histories, 2 sequences."]
    assert known.find([1, 2], 3) == NgramMatch((3,), 2, "history")
    assert known.info().limit_tokens == 10
    known.learn([7, 8, 9])
    caplog.clear()
    assert content(path) == [(4, 5, 6), (1, 2, 3), (7, 8, 9)]
    assert not caplog.records
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["history"]


def test_an_old_file_of_another_tokenizer_is_refused_too(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(OLD)
    with pytest.raises(ValueError, match=r"another tokenizer \(ours with 100 tokens, not theirs with 100\)"):
        History.open(path, fingerprint="theirs", vocabulary=100)
    assert content(path) == [(4, 5, 6), (1, 2, 3)]


def database(*statements: str) -> bytes:
    """An SQLite file of these tables."""
    with closing(sqlite3.connect(":memory:")) as made:
        made.executescript(";".join(statements))
        return made.serialize()


OTHER, MINE = "CREATE TABLE t (a)", "PRAGMA application_id = 1633970536"
DAMAGE = {
    "foreign": (b"#!/bin/sh\n", "is not a history file"),
    "pickle": (b"\x80\x04\x95.\n", "is not a history file"),
    "json": (b"[1]\n", "is not a history file"),
    "nested": (b"[" * 4000, "is not a history file"),
    "cut off": (database(OTHER)[:600], "is damaged"),
    "another program's": (database(OTHER), "is not a history file"),
    "newer": (database(OTHER, MINE, "PRAGMA user_version = 3"), "format 3; this version of adi reads 2"),
    "other tables": (database(OTHER, MINE, "PRAGMA user_version = 2"), "damaged: its tables"),
    "old, cut in its line": (LINE[:-9], "is damaged"),
    "old, newer": (LINE.replace(b": 1,", b": 2,", 1), "damaged: its first line: adi_habits"),
    "old, lacks": (b'{"adi_habits": 1}\n', "damaged: its first line"),
    "old, kind": (LINE.replace(b"100", b"true"), "damaged: its first line: vocabulary"),
    "old, limit": (LINE.replace(b"10,", b"-1,"), "damaged: its first line: limit_tokens"),
    "old, zeros": (LINE + bytes(64), "the record at byte 0 has changed"),
    "old, changed": (LINE + record(3, 1, 2, 3)[:-1] + b"\1" + record(3, 1, 2, 3), "the record at byte 0 has changed"),
    "old, repeats": (LINE + record(0, 3), "the record at byte 0 has changed"),
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
    assert [p.name for p in path.parent.iterdir()] == ["history"]


@pytest.mark.parametrize("row", [b"\1\0\0\0\2", b"", "text", 5, struct.pack("<3I", 1, 2, 100)])
def test_rows_that_are_no_token_ids_are_refused(path: Path, row: Any) -> None:
    History.open(path, **OURS)
    with closing(sqlite3.connect(path)) as forged, forged:
        forged.execute("INSERT INTO sequences (ids) VALUES (?)", (row,))
    with pytest.raises(ValueError, match=r"damaged: (row 1 holds no token ids|token id 100 is outside the vocabulary)"):
        History.open(path, **OURS)


def test_a_forged_file_runs_nothing(path: Path) -> None:
    """SQL triggers in it would run when a sequence is learned."""
    History.open(path, **OURS)
    with closing(sqlite3.connect(path)) as forged:
        forged.execute("CREATE TRIGGER t AFTER INSERT ON sequences BEGIN DELETE FROM meta; END")
    with pytest.raises(ValueError, match="its tables are not as adi makes them"):
        History.open(path, **OURS)


def test_what_was_dropped_is_erased(path: Path) -> None:
    known, secret = History.open(path, **OURS), struct.pack("<4I", 71, 72, 73, 74)
    known.learn([71, 72, 73, 74])
    assert secret in path.read_bytes()
    known.forget()
    assert secret not in path.read_bytes()


def test_another_tokenizers_file_is_refused(path: Path) -> None:
    History.open(path, **OURS)
    with pytest.raises(ValueError, match=r"another tokenizer \(ours with 100 tokens, not theirs with 100\).* file of its own"):
        History.open(path, fingerprint="theirs", vocabulary=100)
    with pytest.raises(ValueError, match="ours with 100 tokens, not ours with 101"):
        History.open(path, fingerprint="ours", vocabulary=101)


def test_what_cannot_be_meant_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the history"):
        History.open(path, **OURS, create=False)
    for place in (tmp_path, Path("/dev/null"), Path("/proc/no/history"), Path("a\0b")):
        with pytest.raises(ValueError, match=r"not a file|cannot use"):
            History.open(place, **OURS)
    with pytest.raises(ValueError, match="limit_tokens: expected int >= 1"):
        History.open(path, **OURS, limit_tokens=0)
    known = History.open(path, **OURS)
    for bad in (100, -1):
        with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 100\)"):
            known.learn([1, 2, 3, bad])
    with pytest.raises(ValueError, match="keep_tokens is -1"):
        known.prune(-1)
