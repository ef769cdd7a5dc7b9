"""Files are whole or absent, also when two processes or an interruption meet."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from adi.files import cache_folder, read_json, require_writable, whole_folder, write_json, write_text


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


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), whole_folder(tmp_path / "f") as fresh:
        (fresh / "a").write_text("a")
        raise RuntimeError
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
