"""Files that are whole or absent: written to a temporary name beside their place, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step; ValueError, naming the path, when that cannot be done."""
    data = text.encode("utf-8", errors="replace")  # half a surrogate pair is no reason to lose a result
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
            file.write(data)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}. Choose a place you may write to.") from None


def require_writable(path: Path) -> None:
    """ValueError if ``path`` could not be written: better before an hour's work than after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}. Choose a place you may write to.") from None


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path, what: str) -> Any:
    """The JSON value in ``path``; ValueError says that this ``what`` is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the {what} {path}: {error.strerror or error}.") from None
    except ValueError as error:  # broken JSON and broken UTF-8 alike
        raise ValueError(f"the {what} {path} is damaged: {error}.") from None


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and vanishes when it does not.

    Where ``path`` is there already, by then or before, that one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield folder
        folder.chmod(0o755)
        try:
            folder.rename(path)
        except OSError:
            if not path.is_dir():
                raise  # another process that made the same folder first is no error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked_file(path: Path, what: str, *, writing: bool = False, create: bool = False) -> Iterator[BinaryIO]:
    """The file under a lock: shared, or exclusive for ``writing``; mode 0600 where it is made. ValueError names ``what``.

    Under the exclusive lock the file may be replaced, as the last act: whoever waited for the lock then finds that another
    file stands in its place, and opens again.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        raise ValueError(f"a {what} needs file locks of a kind that this system lacks; do without it.") from None
    flags = (os.O_RDWR | (os.O_CREAT if create else 0)) if writing else os.O_RDONLY
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)  # not to wait for a pipe's other end
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                os.close(handle)
                raise ValueError(f"{path} is not a file, so it cannot be a {what}; choose another place.")
            with os.fdopen(handle, "r+b" if writing else "rb") as file:
                fcntl.flock(handle, fcntl.LOCK_EX if writing else fcntl.LOCK_SH)
                if _still_at(path, handle):
                    yield file
                    return
    except OSError as error:
        raise ValueError(f"cannot use the {what} {path}: {error.strerror or error}. Choose another place.") from None


def _still_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def cache_folder() -> Path:
    """Where converted models are kept: ``$ADI_CACHE``, else ``adi`` under the user's cache folder."""
    if chosen := os.environ.get("ADI_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "adi"


def package_data(name: str) -> Path:
    """A folder of data that the package carries."""
    return Path(__file__).parent / "data" / name
