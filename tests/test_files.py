"""Files are whole or absent, also when two processes or an interruption meet."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from adi.errors import FileError
from adi.files import read_json, require_readable, require_writable, whole_file, write_json, write_text


def test_text_replaces_text_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for text in ("one", "zwei é 😀", "half a pair \ud800"):
        write_text(tmp_path / "deep" / "t.txt", text)
    assert (tmp_path / "deep" / "t.txt").read_text() == "half a pair ?"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["t.txt"]


def test_json_comes_back_or_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json", "thing") == {"é": [1, None]}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"the thing .*a\.json is damaged"):
        read_json(tmp_path / "a.json", "thing")
    with pytest.raises(ValueError, match="cannot read the thing"):
        read_json(tmp_path / "b.json", "thing")


@pytest.mark.parametrize("place", ["/proc/no/t", "/dev/null/t"])
def test_a_place_that_cannot_be_written_is_named(place: str) -> None:
    with pytest.raises(ValueError, match=f"cannot write {place}"):
        write_text(Path(place), "x")
    with pytest.raises(ValueError, match=f"cannot write {place}"):
        require_writable(Path(place))


# A7
def test_files_have_modes_by_umask_whoever_writes_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "a.safetensors") as fresh:
            save_file({"a": np.zeros(3)}, fresh)  # makes a file of mode 0600
        write_text(tmp_path / "b.txt", "b")
    finally:
        os.umask(before)
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {"a.safetensors": 0o640, "b.txt": 0o640}


# A7
def test_a_file_that_is_not_for_this_user_is_told_with_its_owner_and_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    write_json(file, 1)
    file.chmod(0o600)
    monkeypatch.setattr(os, "access", lambda path, _: path != file)
    told = rf"cannot read .*a.json: it belongs to user {os.getuid()} with mode 600, .* chmod -R a\+rX .*a.json"
    with pytest.raises(FileError, match=told):
        read_json(file, "thing")
    monkeypatch.setattr(os, "access", lambda path, _: path == tmp_path.parent)
    with pytest.raises(FileError, match=r"cannot read .*a.json: /\S* belongs to user"):
        require_readable(file)


# A10
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_a_full_disk_is_named_and_nothing_is_left(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    told = rf"cannot write .*a: no room is left on the disk \(0.0 MB free in {tmp_path}\)"
    with pytest.raises(FileError, match=told), whole_file(tmp_path / "a"):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_bug_while_a_file_is_written_stays_a_bug(tmp_path: Path) -> None:
    for bug in (RuntimeError("shapes"), KeyError("a"), FileError("another file")):
        with pytest.raises(type(bug)) as caught, whole_file(tmp_path / "a"):
            raise bug
        assert caught.value is bug
    assert not list(tmp_path.iterdir())


# A23
def test_what_a_killed_process_left_of_a_file_is_removed_in_time(tmp_path: Path) -> None:
    for name, age in ((".a.0123abcd.tmp", 7200), (".a.89abcdef.tmp", 0), (".b.0123abcd.tmp", 7200)):
        (tmp_path / name).write_text("begun")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_text(tmp_path / "a", "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"a", ".a.89abcdef.tmp", ".b.0123abcd.tmp"}


def test_several_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "train.json"

    def write(number: int) -> None:
        for _ in range(100):
            write_text(path, str(number))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    assert path.read_text() in "0123"
    assert [*tmp_path.iterdir()] == [path]


def test_devices_pipes_and_links_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    require_writable(tmp_path / "pipe", tmp_path / "link", Path(os.devnull))
    write_text(tmp_path / "link", "through it")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "along it")
    assert os.read(end, 99) == b"along it"
    os.close(end)
    assert (tmp_path / "real").read_text() == "through it"
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe", "real"]
