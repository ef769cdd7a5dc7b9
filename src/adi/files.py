"""Files that are whole or absent: written to a temporary name beside their place, then renamed."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adi.errors import FileError

MOST_BYTES = 256 << 20  # of a text or JSON file that adi reads whole
FULL = (errno.ENOSPC, errno.EDQUOT)
ALMOST_NONE = 1 << 20  # free bytes of a disk on which a write that failed without a reason failed for want of room
ABANDONED_SECONDS = 3600.0  # no file takes so long to write
ELSEWHERE = "Choose a place you may write to."


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with a home folder in the place of ``~``; FileError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileError(f"{str(path)!r} begins with a home folder that does not exist; write the whole path.") from None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step; FileError, naming the path, when that cannot be done."""
    data = text.encode("utf-8", errors="replace")  # half a surrogate pair is no reason to lose a result
    with whole_file(path) as fresh:
        fresh.write_bytes(data)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file that becomes ``path`` when the block ends well, and vanishes when it does not; its mode is by umask.

    What a process that was killed left of the same file an hour ago is removed. A pipe or a device is written to itself.
    FileError, naming the path, for what the system or the writer in the block refuses.
    """
    if is_stream(path):
        with writing(path):
            yield path
        return
    place = Path(os.path.realpath(path))  # a link stays one
    made = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        with writing(path):
            place.parent.mkdir(parents=True, exist_ok=True)
            for left in place.parent.glob(f".{glob.escape(place.name)}.????????.tmp"):
                with suppress(FileNotFoundError):  # another process writes the same file, and has just ended
                    if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                        left.unlink()
            made.open("xb").close()
            mode = made.stat().st_mode
            yield made
            with suppress(OSError):  # a disk without modes
                made.chmod(mode)  # safetensors writes 0600
            made.replace(place)
    finally:
        with suppress(OSError):
            made.unlink(missing_ok=True)


def is_stream(path: Path) -> bool:
    """Whether this is a device or a pipe, such as /dev/null and /dev/stdout: to be written to, and not to be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def writing(path: Path, fix: str = ELSEWHERE) -> Iterator[None]:
    """What the system refuses while ``path`` is written becomes a FileError that names path, reason and ``fix``, also where a
    library tells it in words of its own; all other errors stay as they are."""
    try:
        yield
    except Exception as error:
        if (reason := _reason(error, path)) is None:
            raise
        raise FileError(f"cannot write {path}: {reason}. {fix}") from None


def _reason(error: Exception, path: Path) -> str | None:
    """Why a write failed, None where it is not known to be the system's doing."""
    if not isinstance(error, (OSError, RuntimeError)) and type(error).__name__ != "SafetensorError":
        return None
    number, text = getattr(error, "errno", None), str(error)
    if found := re.search(r"os error (\d+)", text):  # safetensors
        number = int(found[1])
    folder = next(p for p in path.absolute().parents if p.is_dir())
    free = shutil.disk_usage(folder).free
    if number in FULL or (number is None and free < ALMOST_NONE):  # OpenVINO and torch do not say it
        return f"no room is left on the disk ({megabytes(free)} free in {folder})"
    if number is not None:
        return os.strerror(number)
    return text.strip() if isinstance(error, OSError) or "iostream error" in text else None


def megabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:,.1f} MB"


def require_writable(*paths: Path | None) -> None:
    """FileError if one of these files (None: none is wanted) could not be written: better before an hour's work than after."""
    for path in paths:
        if path is None or is_stream(path):
            continue
        if path.is_dir():
            raise FileError(f"cannot write {path}: it is a folder. Name a file.")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.").close()


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def require_readable(*paths: Path) -> None:
    """FileError for a file or folder that is there, but not for this user: whose it is, its mode, and what to do."""
    for path in paths:
        try:
            path.stat()
            allowed = os.access(path, os.R_OK)
        except (OSError, ValueError) as error:  # others: it is not there, or no file can have such a name
            allowed = not isinstance(error, PermissionError)
        ways = () if allowed else (*reversed(path.absolute().parents), path)
        closed = next((way for way in ways if way.exists() and not os.access(way, os.X_OK if way.is_dir() else os.R_OK)), None)
        if closed is not None:
            its = closed.stat()
            raise FileError(
                f"cannot read {path}: {'it' if closed == path else closed} belongs to user {its.st_uid} with mode "
                f"{stat.S_IMODE(its.st_mode):03o}, and this is user {os.geteuid()}. Its owner can run: chmod -R a+rX {closed}"
            )


def require_file(path: Path, what: str, most_bytes: int) -> None:
    """FileError, naming ``what``, unless ``path`` is a file (reading a pipe or a device might never end) of at most so many
    bytes that the user may read."""
    require_readable(path)
    try:
        state = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise FileError(f"cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}.") from None
    if not stat.S_ISREG(state.st_mode):
        raise FileError(f"cannot read the {what} {path}: it is not a file.")
    if state.st_size > most_bytes:
        raise FileError(f"the {what} {path} has {state.st_size} bytes; more than {most_bytes} are none that adi wrote.")


def read_text(path: Path, what: str, most_bytes: int = MOST_BYTES) -> str:
    """The text in ``path``, UTF-8; FileError says that this ``what`` is missing, too large or damaged."""
    require_file(path, what, most_bytes)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot read the {what} {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise FileError(f"the {what} {path} is damaged: {error}.") from None


def read_json(path: Path, what: str) -> Any:
    """The JSON value in ``path``; FileError says that this ``what`` is missing, too large or damaged."""
    text = read_text(path, what)
    try:
        return parse_json(text)
    except ValueError as error:
        raise FileError(f"the {what} {path} is damaged: {error}.") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; FileError also where it is nested too deeply for Python's reader."""
    try:
        return json.loads(text)
    except RecursionError:
        raise FileError("it is nested too deeply") from None


def package_data(name: str) -> Path:
    """A folder of data that the package carries."""
    return Path(__file__).parent / "data" / name
