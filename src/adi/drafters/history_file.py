"""The file of ``History``: a line of JSON, then records that processes append under a lock.

A record is three words, what follows and nothing else: how many ids, the crc32 of the ids, the crc32 of the two words
before; then the ids. A record of no ids is followed by one word, the number of an earlier sequence of this file (counted
from 0), which thereby becomes the newest. All words are uint32, little-endian. So reading the file runs nothing, a record
that a crash cut off is told from a damaged one, and a repeated sequence costs 16 bytes instead of a new file.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from adi.errors import AdiError
from adi.files import locked_file

FORMAT = 1
WHAT = "habits file"
HEADER_BYTES = 4096
WORD = 4
HEAD = struct.Struct("<III")
MOST_TOKENS = 1 << 22
BYTES_PER_TOKEN = 16  # more than the shortest kept sequence, of three tokens, takes for each; the rest is for repetitions
SLACK = 8  # a file that is too full gives up this part of its limit at once, so that it is not written anew every time


@dataclass(frozen=True)
class Header:
    """The first line: whose ids these are, and how many may be kept. ``edition`` changes whenever the file is written anew."""

    fingerprint: str
    vocabulary: int
    limit_tokens: int
    edition: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        if not 0 < len(self.fingerprint) <= 200:
            raise AdiError(f"fingerprint has {len(self.fingerprint)} characters; give adi.model.tokenizer's of the tokenizer.")
        if not 0 < self.vocabulary < 1 << 31:
            raise AdiError(f"vocabulary is {self.vocabulary}; it must be at least 1 and below 2**31.")
        if not 0 < self.limit_tokens <= MOST_TOKENS:
            raise AdiError(f"limit_tokens is {self.limit_tokens}; choose 1 to {MOST_TOKENS}.")

    def line(self) -> bytes:
        return json.dumps({"adi_habits": FORMAT, **asdict(self)}).encode() + b"\n"

    @property
    def most_bytes(self) -> int:
        return HEADER_BYTES + BYTES_PER_TOKEN * self.limit_tokens


class HistoryFile:
    """The file, and what this process has read of it.

    ``order`` holds the sequences as bytes, oldest first, with their numbers. ``log`` is every sequence in the order in which
    it became the newest; where something was dropped, a new list is begun.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self._begin(header, ())

    def _begin(self, header: Header, sequences: Sequence[bytes]) -> None:
        self.header, self._end = header, len(header.line())
        self._numbered: list[bytes] = []
        self.order: dict[bytes, int] = {}
        self.log: list[bytes] = []
        self.tokens = 0
        for ids in sequences:
            self._take(ids)
            self._end += len(_record(ids))

    def _take(self, ids: bytes) -> None:
        """Note what the file now ends with."""
        number = self.order.pop(ids, None)
        if number is None:
            number = len(self._numbered)
            self._numbered.append(ids)
            self.tokens += len(ids) // WORD
        self.order[ids] = number
        self.log.append(ids)

    def load(self, create: bool, limit_tokens: int | None) -> None:
        """Read everything, from a file that is made where there is none; take on ``limit_tokens`` where it is another."""
        with locked_file(self.path, WHAT, writing=create or limit_tokens is not None, create=create) as file:
            self._sync(file, writing=create)
            if limit_tokens not in (None, self.header.limit_tokens):
                self.header = replace(self.header, limit_tokens=limit_tokens)
                self._rewrite(_newest(list(self.order), self.header.limit_tokens))

    def refresh(self) -> int:
        """Read what other processes have added. The bytes of the file."""
        with locked_file(self.path, WHAT) as file:
            self._sync(file, writing=False)
            return os.fstat(file.fileno()).st_size

    def append(self, ids: bytes) -> None:
        """Make ``ids``, or as much of its end as may be kept, the newest sequence; drop the oldest where they are too many."""
        with locked_file(self.path, WHAT, writing=True, create=True) as file:
            self._sync(file, writing=True)
            limit = self.header.limit_tokens
            ids = ids[-WORD * limit :]  # another process may have lowered the limit
            if next(reversed(self.order), None) == ids:
                return
            known = self.order.get(ids)
            record = _record(ids) if known is None else _moved(known)
            tokens = self.tokens + (len(ids) // WORD if known is None else 0)
            if tokens > limit or self._end + len(record) > self.header.most_bytes:
                kept = [other for other in self.order if other != ids]
                room = limit - limit // SLACK if tokens > limit else limit
                self._rewrite([*_newest(kept, room - len(ids) // WORD), ids])
            else:
                file.seek(self._end)
                file.truncate()  # of a record that a crash cut off
                file.write(record)
                file.flush()
                self._end += len(record)
                self._take(ids)

    def keep(self, tokens: int) -> None:
        """Drop the oldest sequences until at most so many tokens are left."""
        with locked_file(self.path, WHAT, writing=True, create=True) as file:
            if tokens:  # to empty a file it need not be readable
                self._sync(file, writing=True)
            self._rewrite(_newest(list(self.order), tokens))

    def _rewrite(self, sequences: Sequence[bytes]) -> None:
        """A new edition of these sequences in the file's place. Only under the exclusive lock, as its last act.

        Not forced to the disk: a memory that is lost with the electricity costs speed, nothing else.
        """
        header = replace(self.header, edition=secrets.token_hex(8))
        fresh = self.path.with_name(f".{self.path.name}.tmp")  # the lock allows one writer, so one name does
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(header.line() + b"".join(map(_record, sequences)))
        fresh.replace(self.path)
        self._begin(header, sequences)

    def _sync(self, file: BinaryIO, writing: bool) -> None:
        """Read on from where this process stopped, or all of it where it is another edition by now."""
        line = file.readline(HEADER_BYTES)
        if not line and writing:
            self._begin(replace(self.header, edition=secrets.token_hex(8)), ())
            file.write(self.header.line())
            file.flush()
            return
        if line != self.header.line():
            header = parse_header(line, self.path)
            self._check(header)
            self._begin(header, ())
        size = os.fstat(file.fileno()).st_size
        if size < self._end:  # cut off from outside
            self._begin(self.header, ())
        if size > self.header.most_bytes:
            raise _damaged(self.path, f"it has more bytes than {self.header.limit_tokens} tokens can take")
        file.seek(self._end)
        try:
            for ids, size in _records(file.read(), self._numbered, self.header.vocabulary):
                self._take(ids)
                self._end += size
            if self.tokens > self.header.limit_tokens:
                raise AdiError(f"it holds {self.tokens} tokens, but {self.header.limit_tokens} are its limit")
        except ValueError as error:
            raise _damaged(self.path, str(error)) from None

    def _check(self, other: Header) -> None:
        own = self.header
        if other.fingerprint != own.fingerprint:
            raise AdiError(
                f"the habits in {self.path} are of another tokenizer (fingerprint {other.fingerprint}, not "
                f"{own.fingerprint}), so its token ids mean other texts. Give each tokenizer a file of its own."
            )
        if other.vocabulary != own.vocabulary:
            raise AdiError(
                f"the habits in {self.path} are of a vocabulary of {other.vocabulary} tokens, not {own.vocabulary}. "
                "Give this model a file of its own."
            )


def read_header(path: Path) -> Header:
    """The first line of a habits file; ValueError where there is no such file."""
    with locked_file(path, WHAT) as file:
        return parse_header(file.readline(HEADER_BYTES), path)


def parse_header(line: bytes, path: Path) -> Header:
    """The header from its line; ValueError says that the file is something else, of another format, or damaged."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or "adi_habits" not in value or not line.endswith(b"\n"):
        raise AdiError(f"{path} is not a habits file. Choose another name, or delete it.")
    if (found := value.pop("adi_habits")) != FORMAT:
        raise AdiError(f"{path} is a habits file of format {found!r}; this version of adi reads {FORMAT}. Delete it.")
    kinds = {"fingerprint": str, "vocabulary": int, "limit_tokens": int, "edition": str}
    if set(value) != {f.name for f in fields(Header)} or any(type(value[name]) is not kind for name, kind in kinds.items()):
        raise _damaged(path, "its first line lacks something or says too much")
    try:
        header = Header(**value)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if header.line() != line:
        raise _damaged(path, "its first line is not as it was written")
    return header


def _damaged(path: Path, why: str) -> AdiError:
    return AdiError(f"the habits file {path} is damaged: {why.rstrip('.')}. Delete it; what it held is learned again in time.")


def _newest(sequences: Sequence[bytes], tokens: int) -> list[bytes]:
    """As many of the last sequences as fit into so many tokens, oldest first."""
    kept: list[bytes] = []
    for ids in reversed(sequences):
        tokens -= len(ids) // WORD
        if tokens < 0:
            break
        kept.append(ids)
    return kept[::-1]


def _record(ids: bytes) -> bytes:
    return _head(len(ids) // WORD, ids) + ids


def _moved(number: int) -> bytes:
    body = number.to_bytes(WORD, "little")
    return _head(0, body) + body


def _head(count: int, body: bytes) -> bytes:
    start = struct.pack("<II", count, zlib.crc32(body))
    return start + zlib.crc32(start).to_bytes(WORD, "little")


def _records(data: bytes, numbered: Sequence[bytes], vocabulary: int) -> Iterator[tuple[bytes, int]]:
    """Every whole record: the ids it makes the newest, and its bytes. ``numbered`` grows as the caller takes them.

    Stops before a last record that is not whole. ValueError for anything else that no adi has written.
    """
    at = 0
    while at + HEAD.size <= len(data):
        count, checksum, own = HEAD.unpack_from(data, at)
        if zlib.crc32(data[at : at + 2 * WORD]) != own:
            raise AdiError(f"no record begins at byte {at} of what was read")
        stop = at + HEAD.size + WORD * (count or 1)
        body = data[at + HEAD.size : stop]
        if stop > len(data) or (stop == len(data) and zlib.crc32(body) != checksum):
            return
        if zlib.crc32(body) != checksum:
            raise AdiError(f"the record at byte {at} of what was read has changed")
        if not count:
            number = int.from_bytes(body, "little")
            if number >= len(numbered):
                raise AdiError(f"it repeats sequence {number}, but holds {len(numbered)}")
            body = numbered[number]
        elif (most := _highest(body)) >= vocabulary:
            raise AdiError(f"token id {most} is outside the vocabulary [0, {vocabulary})")
        yield body, stop - at
        at = stop


def _highest(ids: bytes) -> int:
    import numpy as np

    return int(np.frombuffer(ids, "<u4").max())
