"""The cache folder: where it is, that it can be written, folders in it that are whole or absent, what is in it."""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import platform
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from adi.errors import FileError
from adi.files import expanded, megabytes, read_json, write_text, writing

FIX = "Set ADI_CACHE to a folder that you may write to and that has room."
ABANDONED_SECONDS = 86_400.0  # what another machine, or this one before it was started, left so long ago is nobody's
UNFINISHED = ".*.*"
BOOT = Path("/proc/sys/kernel/random/boot_id")


def cache_folder() -> Path:
    """Where converted models are kept: ``$ADI_CACHE``, else ``adi`` under the user's cache folder; for a user without a home a
    temporary folder."""
    if chosen := os.environ.get("ADI_CACHE"):
        return expanded(chosen)
    try:
        return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "adi"
    except FileError as error:
        return _temporary(f"{error} {FIX}")


def usable_cache(needs: int = 0) -> Path:
    """The cache folder, asked for before long work: FileError where it cannot be written or lacks the free bytes it ``needs``.

    Where nobody chose it by ``$ADI_CACHE``, a temporary folder of this process and its children takes the place of one that
    cannot be written, and a line says so.
    """
    folder = cache_folder()
    try:
        with writing(folder, FIX):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except FileError as error:
        if os.environ.get("ADI_CACHE"):
            raise
        folder = _temporary(str(error))
    require_space(folder, needs)
    return folder


def _temporary(why: str) -> Path:
    """A folder that ends with this process, in the place of the cache."""
    try:
        folder, _ = _claim(Path(tempfile.gettempdir(), "adi-cache"), ".adi-cache.*.*")
    except OSError:  # nor is there a folder for temporary files
        raise FileError(why) from None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["ADI_CACHE"] = str(folder)
    os.environ.setdefault("HOME", str(folder))  # without any, OpenVINO cannot be imported
    logging.getLogger(__name__).warning("%s For this run models are kept in %s.", why, folder)
    return folder


def require_space(folder: Path, needs: int) -> None:
    """FileError where the disk of this folder has fewer free bytes than are needed."""
    if needs > (free := shutil.disk_usage(folder).free):
        raise FileError(f"{megabytes(needs)} are needed in {folder}, where {megabytes(free)} are free. {FIX}")


@contextmanager
def whole_folder(path: Path, needs: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and vanishes when it does not; modes are by umask.

    It is locked while this process works on it, and what processes that were killed left beside it is removed. Where ``path``
    is there already, by then or before, that one stays. FileError where its disk has fewer free bytes than it ``needs``, and
    for what the system or a writer in the block refuses.
    """
    folder = lock = None
    try:
        with writing(path, FIX):
            path.parent.mkdir(parents=True, exist_ok=True)
            require_space(path.parent, needs)
            folder, lock = _claim(path)
            yield folder
            mode = folder.stat().st_mode & 0o666
            for file in folder.rglob("*"):
                with suppress(OSError):  # a disk without modes
                    file.chmod(mode | (file.stat().st_mode & 0o111))  # safetensors writes 0600
            try:
                folder.rename(path)
            except OSError:
                if not path.is_dir():
                    raise  # another process that made the same folder first is no error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _claim(path: Path, pattern: str = UNFINISHED) -> tuple[Path, int | None]:
    """A fresh folder beside ``path``, locked; those of this pattern that dead processes left there are removed."""
    for left in unfinished(path.parent, pattern):
        shutil.rmtree(left, ignore_errors=True)
    fresh = path.with_name(f"{path.name}.{_machine()}.{secrets.token_hex(4)}")
    fresh.mkdir()
    lock = _lock(fresh)
    return fresh.rename(fresh.with_name(f".{fresh.name}")), lock  # no sooner, or another could take it for abandoned


def _lock(folder: Path) -> int | None:
    """A lock on a folder, which ends with this process or when it is closed; None where the disk has no locks.

    BlockingIOError where another process holds it.
    """
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return None
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return file


@functools.cache
def _machine() -> str:
    """Names the running kernel, which is one for all containers on it: among its processes locks are to be trusted."""
    with suppress(OSError):
        return BOOT.read_text().strip()[:8]
    return platform.node().partition(".")[0] or "unknown"


def unfinished(parent: Path, pattern: str = UNFINISHED) -> list[Path]:
    """Temporary folders of ``whole_folder`` that processes left there when they were killed."""
    return [folder for folder in parent.glob(pattern) if folder.is_dir() and _is_abandoned(folder)]


def _is_abandoned(folder: Path) -> bool:
    try:
        if folder.name.split(".")[-2] == _machine() and (lock := _lock(folder)) is not None:
            os.close(lock)
            return True
        return time.time() - folder.stat().st_mtime > ABANDONED_SECONDS
    except OSError:  # another process holds its lock, or has just removed it
        return False


def identity(files: Sequence[Path]) -> str:
    """Names files by what is in them, wherever they lie; noted where the cache can be written, since it reads them whole.

    A file in the hub's cache is known by the name of its blob.
    """
    facts = [(str(file.resolve()), (s := file.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for file in files]
    note = cache_folder() / "contents" / hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
    with suppress(OSError, ValueError):
        return bytes.fromhex(note.read_text()).hex()
    whole = hashlib.blake2b(digest_size=8)
    for file in files:
        blob = file.resolve()
        whole.update(f"{file.name} {blob.name if blob.parent.name == 'blobs' else _digest(file)}|".encode())
    with suppress(FileError):
        write_text(note, whole.hexdigest())
    return whole.hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "blake2b").hexdigest()


@dataclass(frozen=True)
class CacheEntry:
    """What the cache holds of a model: ``what`` it is, where, and its size."""

    name: str
    what: str
    path: Path
    bytes: int

    def delete(self) -> None:
        """Remove it; whoever has it open keeps what is open. FileError where that is not allowed."""
        gone = self.path.with_name(f".{self.path.name}.{_machine()}.{secrets.token_hex(4)}")
        with writing(self.path, FIX):
            self.path.rename(gone)  # whole or absent for others
        shutil.rmtree(gone, ignore_errors=True)


def cache_entries() -> list[CacheEntry]:
    """All that is in the cache, by model; what a living process is making is left out."""
    place, found = cache_folder(), list[CacheEntry]()
    for kind in (p for p in place.glob("*") if p.is_dir()):
        if kind.name in ("contents", "costs", "orders", "sources"):
            found.append(CacheEntry("", f"notes ({kind.name})", kind, _bytes(kind)))
            continue
        found += [CacheEntry(left.name.split(".")[1], "unfinished", left, _bytes(left)) for left in unfinished(kind)]
        for path in kind.glob("[!.]*"):
            name, what = path.name.rpartition("-")[0], kind.name
            with suppress(FileError):
                stated = read_json(path / "model.json", "exported model")
                name, what = str(stated["name"]), f"{kind.name}, {stated['precision']}"
            found.append(CacheEntry(name, what, path, _bytes(path)))
    return sorted(found, key=lambda entry: (entry.name, entry.what, entry.path))


def _bytes(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
