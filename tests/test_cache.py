"""The cache: found or made wherever users have it, whole or absent, and theirs to look at and to clear."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import adi.cache
from adi.cache import cache_entries, cache_folder, identity, unfinished, usable_cache, whole_folder
from adi.errors import FileError
from support import adi_

pytest.importorskip("openvino")

from adi.model.openvino import export_and_open, modules, open_exported
from families import tiny


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    """Another process, with these variables beside ours."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | environment, **given)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, and with the model whose export is in it."""
    place = tmp_path_factory.mktemp("exported")
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text('{"a": 8}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADI_CACHE", str(place / "cache"))
        export_and_open(tiny("llama"), name="llama", precision="fp32", source=place / "model")
    return place


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with contextlib.suppress(KeyError), whole_folder(tmp_path / "f") as fresh:
        (fresh / "a").write_text("a")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "f") as fresh:
        (fresh / "a").write_text("a")
    assert (tmp_path / "f" / "a").read_text() == "a"


def test_two_that_make_the_same_folder_both_succeed(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "f") as first, whole_folder(tmp_path / "f") as second:
        (first / "a").write_text("first")
        (second / "a").write_text("second")
    assert (tmp_path / "f" / "a").read_text() == "second", "the inner one was ready first, and stays"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_the_cache_is_where_it_was_asked_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADI_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("ADI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "adi"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "adi"


# A7
def test_folders_have_modes_by_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "f") as fresh:
            save_file({"a": np.zeros(3)}, fresh / "a.safetensors")  # makes a file of mode 0600
            (fresh / "inner").mkdir()
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "f", *(tmp_path / "f").iterdir())}
    assert modes == {"f": 0o750, "a.safetensors": 0o640, "inner": 0o750}


# A7
def test_an_export_of_another_users_is_not_called_damaged(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADI_CACHE", str(exported / "cache"))
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "readout.safetensors")
    with pytest.raises(FileError, match=r"readout.safetensors: it belongs to user .* chmod") as told:
        open_exported(exported / "model", precision="fp32")
    assert "damaged" not in str(told.value)
    assert "delete" not in str(told.value)


# A8
def test_a_cache_that_was_copied_and_cannot_be_written_is_found(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported / "cache", tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.copytree(exported / "model", tmp_path / "moved", copy_function=shutil.copyfile)
    monkeypatch.setenv("ADI_CACHE", str(tmp_path / "copy"))
    for rows in (tmp_path / "copy").rglob("rows.json"):
        rows.unlink()  # as on a machine of another kind

    def read_only(*_: Any) -> None:
        raise FileError("cannot write: Read-only file system.")

    for place in ("adi.cache.write_text", "adi.model.openvino.row_invariance.write_json"):
        monkeypatch.setattr(place, read_only)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").rglob("*")}
    assert open_exported(tmp_path / "moved", precision="fp32") is not None
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").rglob("*")} == files
    (tmp_path / "moved" / "config.json").write_text('{"a": 9}')
    assert open_exported(tmp_path / "moved", precision="fp32") is None, "another model"


# A8
def test_files_are_the_same_by_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADI_CACHE", str(tmp_path / "cache"))
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.bin").write_text(text)
        os.utime(tmp_path / name / "w.bin", (0, 0))  # as in images that are built reproducibly
    one, same, other = (identity([tmp_path / name / "w.bin"]) for name in "abc")
    assert one == same != other
    monkeypatch.setattr(adi.cache, "_digest", lambda _: pytest.fail("read again, though it was noted"))
    assert identity([tmp_path / "a" / "w.bin"]) == one
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "sha").write_text("three")
    (tmp_path / "link.bin").symlink_to(tmp_path / "blobs" / "sha")
    assert identity([tmp_path / "link.bin"]), "a file in the hub's cache is known by its blob's name"


# A9
def test_a_cache_that_cannot_be_written_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the place of the folder")
    monkeypatch.setattr("adi.model.openvino.export.pipeline.export", lambda *_: pytest.fail("exported"))
    for place in ("/proc/none", tmp_path / "file"):
        monkeypatch.setenv("ADI_CACHE", str(place))
        with pytest.raises(FileError, match=rf"cannot write {place}: .* Set ADI_CACHE to a folder"):
            export_and_open(tiny("llama"), name="llama", precision="fp32")


# A9
def test_without_a_home_a_temporary_cache_is_used_and_said(tmp_path: Path) -> None:
    code = (
        "import os; from adi.cache import usable_cache as u; a = u(); print(a, a.is_dir(), a == u(), os.environ['ADI_CACHE'])"
    )
    for home in ("/proc/none", "~nobody-at-all"):
        process = python(code, HOME=home, ADI_CACHE="", XDG_CACHE_HOME="", TMPDIR=str(tmp_path))
        printed, told = process.communicate()
        place, there, same, shared = printed.split()
        assert (there, same, shared) == ("True", "True", place)
        assert told.count("\n") == 1
        assert f"For this run models are kept in {place}." in told
        assert "ADI_CACHE" in told or home.startswith("~")
    assert not list(tmp_path.iterdir()), "gone with its process"


# A9
def test_without_a_home_and_temporary_files_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HOME", "/proc/none"), ("ADI_CACHE", ""), ("XDG_CACHE_HOME", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", "/proc/none")
    with pytest.raises(FileError, match=r"cannot write /proc/none/.cache/adi: .* Set ADI_CACHE"):
        usable_cache()


# A10
def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    with pytest.raises(FileError, match=r"1,000,000,000,000.0 MB are needed in .*, where .* MB are free\. .*ADI_CACHE"):
        usable_cache(10**18)
    with pytest.raises(FileError, match="are needed"), whole_folder(tmp_path / "f", needs=10**18):
        pytest.fail("begun")
    assert not list(tmp_path.iterdir())


# A23
def test_what_a_killed_process_left_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from adi.cache import whole_folder\n"
        f"with whole_folder(Path({str(tmp_path)!r}) / sys.argv[-1] / 'f') as fresh:\n"
        "    (fresh / 'part').write_text('begun'); print(fresh, flush=True); time.sleep(600)"
    )
    killed, living = (python(code.replace("sys.argv[-1]", repr("place"))) for _ in range(2))
    try:
        left, kept = (Path(str(process.stdout and process.stdout.readline()).strip()) for process in (killed, living))
        assert left.is_dir()
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert unfinished(tmp_path / "place") == [left]
        with whole_folder(tmp_path / "place" / "another"):
            assert not left.exists()
            assert kept.is_dir()
        old = tmp_path / "place" / ".f.other-machine.0123"
        old.mkdir()
        assert unfinished(tmp_path / "place") == [], "perhaps somebody works there"
        os.utime(old, (0, 0))
        assert unfinished(tmp_path / "place") == [old]
    finally:
        living.kill()
        living.wait()


# A23
def test_the_cache_is_listed_and_cleared_model_by_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    assert "total" in adi_("cache").stdout
    for place in ("converted/Some.Q4_0-12ab", "openvino/aa-bb-int8-cc", "openvino/.gone.x.y", "costs"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "weights").write_bytes(b"x" * 1_500_000)
    (tmp_path / "openvino" / "aa-bb-int8-cc" / "model.json").write_text('{"name": "org/Modèle", "precision": "int8"}')
    os.utime(tmp_path / "openvino" / ".gone.x.y", (0, 0))
    assert [(e.name, e.what) for e in cache_entries()] == [
        ("", "notes (costs)"),
        ("Some.Q4_0", "converted"),
        ("gone", "unfinished"),
        ("org/Modèle", "openvino, int8"),
    ]
    listed = adi_("cache", "modèle").stdout
    assert str(tmp_path) in listed
    assert "1.5 MB" in listed
    assert "Some" not in listed
    assert "Nothing is deleted yet" in adi_("cache", "--clear").stderr
    assert len(cache_entries()) == 4
    assert adi_("cache", "Modèle", "--clear", "--yes").exit_code == 0
    assert [e.name for e in cache_entries()] == ["", "Some.Q4_0", "gone"]
    assert adi_("cache", "nothing").exit_code == adi_("cache", "--yes").exit_code == 2
    assert adi_("cache", "--clear", "--yes").exit_code == 0
    assert not cache_entries()


def test_an_export_that_was_deleted_meanwhile_is_not_begun_again(tmp_path: Path) -> None:
    """A folder with graphs of exit heads alone would be taken for an export by the next process."""
    import openvino as ov

    def twice(rows: Any) -> Any:
        return (rows * 2,)

    graph = modules.converted(ov.Core(), tmp_path / "gone", "twice", lambda: twice, (4,), False)
    assert len(graph.inputs) == 1
    assert not list(tmp_path.iterdir())
