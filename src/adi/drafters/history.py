"""``History``: a bounded store of past outputs on disk, asked what followed the last tokens in any of them.

Prompt lookup (Saxena 2023) over more than the text at hand, in the manner of REST (He et al. 2023), which retrieves drafts
from a datastore; here the datastore is what this user's models wrote before. The file is an SQLite database, mode 0600, as it
holds private text; SQLite's locks and journal let several processes use it and survive a crash of any of them.
"""

from __future__ import annotations

import itertools
import json
import logging
import operator
import os
import secrets
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import asdict, replace

from adi.arguments import whole
from adi.drafters.ngram import LONGEST, NgramMatch, RunArray, RunTrie
from adi.errors import FileError, UsageError
from adi.files import expanded, require_file
from adi.schema import Positive, Record, from_json

if TYPE_CHECKING:
    from adi.drafters.ngram import Ids

SHORTEST = 2
LIMIT_TOKENS, MOST_TOKENS = 262_144, 1 << 22
SLACK = 8  # a history that is full drops this part of its limit at once, so that it need not drop again with every sequence
FRESH_TOKENS = 32_768  # so many are kept beside the sorted index before all are sorted again
BORDER = (1 << 32) - 1  # stands before every sequence in the text of the fresh ones; no vocabulary goes that far
WORD = 4  # bytes of a token id: uint32, little-endian
MOST_BYTES = 256 << 20
LOCK_SECONDS = 30
APPLICATION, FORMAT = 0x61646968, 2
SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    "CREATE TABLE sequences (id INTEGER PRIMARY KEY AUTOINCREMENT, ids BLOB NOT NULL)",
)
MAGIC = b"SQLite format 3\0"
OLD_START, OLD_HEAD = b'{"adi_habits"', struct.Struct("<III")


class _Meta(Record, frozen=True):
    """Whose token ids these are, and how many are kept. ``edition`` tells a file from another one of the same name."""

    fingerprint: Annotated[str, Meta(min_length=1, max_length=200)]
    vocabulary: Positive
    limit_tokens: Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
    edition: str


class _OldHeader(_Meta, frozen=True):
    adi_habits: Literal[1]


@dataclass(frozen=True)
class HistoryInfo:
    """What a history holds: ``sequences`` of ``tokens`` in all, in ``bytes`` on disk."""

    path: Path
    sequences: int
    tokens: int
    bytes: int
    limit_tokens: int
    vocabulary: int
    fingerprint: str


class History:
    """Past outputs of one tokenizer. ``find`` what followed in them, ``learn`` another.

    Any number of processes may use one file. What others learn is found from the next ``learn`` or ``info`` on. Not to be
    shared between threads.
    """

    def __init__(self, path: Path, meta: _Meta) -> None:
        self.path, self._meta = path, meta
        self._order: dict[bytes, int] = {}  # sequences and their row ids, the oldest first
        self._last = self._tokens = 0
        self._sorted: RunArray | None = None  # of all sequences but those that were learned since
        self._unindexed: list[bytes] = []
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
        """The history in ``path``, read whole; a file is made where there is none, unless not ``create``.

        A file of adi's earlier format is replaced by one of this format with the same sequences.

        Args:
            path: one file for each tokenizer.
            fingerprint: of the tokenizer (``adi.model.tokenizer.tokenizer_fingerprint``).
            vocabulary: ids lie in [0, vocabulary).
            limit_tokens: most tokens kept, 1 to 4,194,304; None for the file's own limit, 262,144 in a new one. Another
                number replaces the file's limit, and the oldest sequences beyond it are dropped at once.

        Raises:
            AdiError: a file of another tokenizer or vocabulary, a foreign or damaged file, one that cannot be used.
        """
        limit = LIMIT_TOKENS if limit_tokens is None else limit_tokens
        given = dict(fingerprint=fingerprint, vocabulary=vocabulary, limit_tokens=limit, edition=secrets.token_hex(8))
        history = cls(expanded(path).absolute(), from_json(given, _Meta, "a history"))
        with history._transaction(create=create, writing=create or limit_tokens is not None) as database:
            if limit_tokens not in (None, history._meta.limit_tokens):
                database.execute("UPDATE meta SET value = ? WHERE name = 'limit_tokens'", (limit_tokens,))
                history._meta = replace(history._meta, limit_tokens=limit)
                history._drop(database, limit)
        return history

    @classmethod
    def look(cls, path: str | os.PathLike[str]) -> History:
        """The history in an existing file, whichever tokenizer's it is: to show and to prune it."""
        with _connected(expanded(path).absolute()) as database:
            meta = _read_meta(database, Path(path))
        return cls.open(path, fingerprint=meta.fingerprint, vocabulary=meta.vocabulary, create=False)

    def find(self, text: Sequence[int], most: int) -> NgramMatch | None:
        """Up to ``most`` tokens that followed the longest run of the last tokens of ``text`` in any sequence.

        Runs of 8 tokens down to 2 are looked for, the most recent of equally long ones wins, and the continuation ends with
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
            return NgramMatch(tuple(itertools.takewhile(lambda token: token != BORDER, after)), fresh, "history")
        return NgramMatch(index.tokens(start, min(stop, start + most)), matched, "history") if matched else None

    def _index(self) -> RunArray:
        """The sorted index, with all that was learned since in the small one beside it."""
        if self._sorted is None or len(self._fresh_text) > FRESH_TOKENS:
            self._fresh, self._fresh_text, self._unindexed = RunTrie(LONGEST), [], []
            self._sorted = RunArray([_ids(data) for data in self._order], LONGEST, SHORTEST)
        # A sequence that became the newest again is in both; the fresh one is asked first, so the other does not matter.
        for data in self._unindexed:
            begin = len(self._fresh_text) + 1
            self._fresh_text += [BORDER, *_ids(data).tolist()]
            for end in range(begin + SHORTEST, len(self._fresh_text)):
                self._fresh.add(self._fresh_text, end)
        self._unindexed.clear()
        return self._sorted

    def learn(self, ids: Sequence[int]) -> None:
        """Append one finished sequence; one that is there already becomes the newest.

        Where the limit is passed the oldest sequences are dropped, until an eighth of it is free. Of a sequence longer than
        the limit the end is kept; one of two tokens or fewer could never be found, and is not. AdiError for ids outside the
        vocabulary and for a file that cannot be written.
        """
        import numpy as np

        tokens, vocabulary = [operator.index(i) for i in ids], self._meta.vocabulary
        if (bad := next((i for i in tokens if not 0 <= i < vocabulary), None)) is not None:
            raise UsageError(f"token id {bad} is outside the vocabulary [0, {vocabulary}).")
        if len(tokens) <= SHORTEST:
            return
        with self._transaction(create=True, writing=True) as database:
            limit = self._meta.limit_tokens
            data = np.array(tokens[-limit:], "<u4").tobytes()
            if next(reversed(self._order), None) == data:
                return
            database.execute("DELETE FROM sequences WHERE id = ?", (self._order.get(data),))
            self._take(database.execute("INSERT INTO sequences (ids) VALUES (?)", (data,)).lastrowid or 0, data)
            if self._tokens > limit:
                self._drop(database, max(limit - limit // SLACK, len(data) // WORD))

    def newest(self, count: int) -> list[tuple[int, ...]]:
        """The last ``count`` sequences, the newest first."""
        return [tuple(_ids(data).tolist()) for data in itertools.islice(reversed(self._order), count)]

    def prune(self, keep_tokens: int) -> None:
        """Drop the oldest sequences until at most ``keep_tokens`` tokens are left; what is dropped is erased from the file."""
        keep_tokens = whole("keep_tokens", keep_tokens, 0)
        with self._transaction(create=True, writing=True) as database:
            self._drop(database, keep_tokens)
        with _connected(self.path) as database:
            database.execute("VACUUM")

    def forget(self) -> None:
        """Drop everything; the file stays, empty."""
        self.prune(0)

    def info(self) -> HistoryInfo:
        """What the file holds now, other processes' sequences included."""
        with self._transaction():
            meta, size = self._meta, self.path.stat().st_size
        counts = (len(self._order), self._tokens, size)
        return HistoryInfo(self.path, *counts, meta.limit_tokens, meta.vocabulary, meta.fingerprint)

    @contextmanager
    def _transaction(self, *, writing: bool = False, create: bool = False) -> Iterator[sqlite3.Connection]:
        """The database under a lock, with everything read that other processes have changed."""
        try:
            with _connected(self.path, create) as database, database:
                database.execute("BEGIN IMMEDIATE" if writing else "BEGIN")
                if create and not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    _write(database, replace(self._meta, edition=secrets.token_hex(8)), ())
                self._read(database)
                yield database
        except BaseException:
            self._meta = replace(self._meta, edition="")  # read all again: what was noted may not be in the file
            raise

    def _read(self, database: sqlite3.Connection) -> None:
        own, meta = self._meta, _read_meta(database, self.path)
        if (own.fingerprint, own.vocabulary) != (meta.fingerprint, meta.vocabulary):
            raise FileError(
                f"the history {self.path} is of another tokenizer ({meta.fingerprint} with {meta.vocabulary} tokens, not "
                f"{own.fingerprint} with {own.vocabulary}), so its ids mean other texts. Give each tokenizer a file of its own."
            )
        another = own.edition != meta.edition  # another file of this name, or the first reading
        if another and (found := database.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise _damaged(self.path, found)
        self._meta = meta
        for from_start in (another, True):  # what another process has dropped shows in the count
            if from_start:
                self._order, self._last, self._tokens, self._sorted = {}, 0, 0, None
            for row in database.execute("SELECT id, ids FROM sequences WHERE id > ? ORDER BY id", (self._last,)):
                self._take(*row)
            if len(self._order) == database.execute("SELECT count(*) FROM sequences").fetchone()[0]:
                return
        raise _damaged(self.path, "it holds a sequence twice")

    def _take(self, row: int, data: bytes) -> None:
        """Note the sequence that is the newest by now."""
        import numpy as np

        if not isinstance(data, bytes) or not data or len(data) % WORD:
            raise _damaged(self.path, f"row {row} holds no token ids")
        if (highest := int(np.frombuffer(data, "<u4").max())) >= self._meta.vocabulary:
            raise _damaged(self.path, f"token id {highest} is outside the vocabulary [0, {self._meta.vocabulary})")
        if self._order.pop(data, None) is None:
            self._tokens += len(data) // WORD
        self._order[data] = self._last = row
        self._unindexed.append(data)

    def _drop(self, database: sqlite3.Connection, tokens: int) -> None:
        """Drop the oldest sequences until at most so many tokens are left."""
        while self._tokens > tokens:
            data, row = next(iter(self._order.items()))
            database.execute("DELETE FROM sequences WHERE id = ?", (row,))
            del self._order[data]
            self._tokens -= len(data) // WORD
            self._sorted = None


@contextmanager
def _connected(path: Path, create: bool = False) -> Iterator[sqlite3.Connection]:
    """The database in this file; FileError for what the system or SQLite refuses."""
    if "\0" in str(path):
        raise FileError(f"cannot use the history {str(path)!r}: no file has such a name.")
    try:
        path = path.resolve()  # so that a conversion keeps a link
        if create and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT, 0o600))
        require_file(path, "history", MOST_BYTES)
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
        if start.startswith(OLD_START):
            _convert(path)
        elif start not in (MAGIC, b""):
            raise FileError(f"{path} is not a history file. Choose another name, or delete it.")
        database = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=LOCK_SECONDS, isolation_level=None)
        with closing(database):
            database.executescript("PRAGMA trusted_schema = OFF; PRAGMA secure_delete = ON; PRAGMA synchronous = NORMAL;")
            yield database
    except (OSError, sqlite3.OperationalError) as error:
        raise FileError(f"cannot use the history {path}: {getattr(error, 'strerror', None) or error}.") from None
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from None


def _read_meta(database: sqlite3.Connection, path: Path) -> _Meta:
    """Whose history this is; FileError for a database of another program, or with tables that adi did not make."""
    application, version = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if application != APPLICATION:
        raise FileError(f"{path} is not a history file. Choose another name, or delete it.")
    if version != FORMAT:
        raise FileError(f"{path} is a history file of format {version}; this version of adi reads {FORMAT}. Delete it.")
    made = [sql for (sql,) in database.execute("SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY name")]
    if made != list(SCHEMA):
        raise _damaged(path, "its tables are not as adi makes them")
    try:
        return from_json(dict(database.execute("SELECT name, value FROM meta")), _Meta, "its tokenizer")
    except FileError as error:
        raise _damaged(path, str(error)) from None


def _write(database: sqlite3.Connection, meta: _Meta, sequences: Iterable[bytes]) -> None:
    """Fill an empty database."""
    for statement in (f"PRAGMA application_id = {APPLICATION}", f"PRAGMA user_version = {FORMAT}", *SCHEMA):
        database.execute(statement)
    database.executemany("INSERT INTO meta VALUES (?, ?)", asdict(meta).items())
    database.executemany("INSERT INTO sequences (ids) VALUES (?)", ((data,) for data in sequences))


def _damaged(path: Path, why: str) -> FileError:
    return FileError(f"the history {path} is damaged: {why.rstrip('.')}. Delete it; what it held is learned again in time.")


def _ids(data: bytes) -> Ids:
    import numpy as np

    return np.frombuffer(data, "<u4").astype(np.int32)


def _convert(path: Path) -> None:
    """Put a file of this format in the place of one of the earlier format, with the same sequences, whole or not at all."""
    line, _, records = path.read_bytes().partition(b"\n")
    try:
        header = from_json(json.loads(line), _OldHeader, "its first line")
        sequences = list(_old_sequences(records))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fresh.unlink(missing_ok=True)
    try:
        with _connected(fresh, create=True) as database, database:
            database.execute("BEGIN IMMEDIATE")
            _write(database, _Meta(header.fingerprint, header.vocabulary, header.limit_tokens, header.edition), sequences)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    logging.getLogger(__name__).warning("%s: converted to the new format of histories, %d sequences.", path, len(sequences))


def _old_sequences(data: bytes) -> dict[bytes, Any]:
    """The sequences of an old file, oldest first. AdiError for damage, other than a last record that a crash cut off.

    A record is three words: how many ids, the crc32 of the body, the crc32 of the two words before; then the ids, or where
    there are none the number of an earlier sequence, which becomes the newest.
    """
    at, numbered, order = 0, list[bytes](), dict[bytes, None]()
    while at + OLD_HEAD.size <= len(data):
        count, checksum, own = OLD_HEAD.unpack_from(data, at)
        start, stop = at + OLD_HEAD.size, at + OLD_HEAD.size + WORD * (count or 1)
        body, right = data[start:stop], zlib.crc32(data[at : at + 2 * WORD]) == own
        if right and zlib.crc32(body) != checksum and stop >= len(data):
            break
        number = len(numbered) if count else int.from_bytes(body, "little")
        if count:
            numbered.append(body)
        if not right or zlib.crc32(body) != checksum or number >= len(numbered):
            raise FileError(f"the record at byte {at} has changed")
        order.pop(numbered[number], None)
        order[numbered[number]] = None
        at = stop
    return order
