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
from typing import Any

from adi.errors import FileError

MOST_BYTES = 256 << 20  # of a text or JSON file that adi reads whole


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with a home folder in the place of ``~``; FileError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileError(f"{str(path)!r} begins with a home folder that does not exist; write the whole path.") from None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step; FileError, naming the path, when that cannot be done."""
    data = text.encode("utf-8", errors="replace")  # half a surrogate pair is no reason to lose a result
    with _writing(path):
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
            made = Path(file.name)
        try:
            made.write_bytes(data)
            made.chmod(0o644)
            made.replace(path)
        finally:
            made.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """The folder of ``path`` made; what the system refuses becomes a FileError that names the path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}. Choose a place you may write to.") from None


def require_writable(*paths: Path | None) -> None:
    """FileError if one of these files (None: none is wanted) could not be written: better before an hour's work than after."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise FileError(f"cannot write {path}: it is a folder. Name a file.")
        with _writing(path):
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.").close()


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def require_file(path: Path, what: str, most_bytes: int) -> None:
    """FileError, naming ``what``, unless ``path`` is a file (reading a pipe or a device might never end) of at most so many
    bytes."""
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


def cache_folder() -> Path:
    """Where converted models are kept: ``$ADI_CACHE``, else ``adi`` under the user's cache folder."""
    if chosen := os.environ.get("ADI_CACHE"):
        return expanded(chosen)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "adi"


def package_data(name: str) -> Path:
    """A folder of data that the package carries."""
    return Path(__file__).parent / "data" / name
