"""Consoles as users have them: other encodings, pipes that close, full disks behind standard output."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adi.cli.shared.output import read_input, show_json
from adi.cli.shared.paint import Painter
from adi.decoding.records import Step
from adi.errors import UsageError

NAME = "mod\u00e8le \u65e5\u672c \U0001f600"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with one model in it, of that name."""
    folder = tmp_path / "cache" / "openvino" / "aa-bb-int8-cc"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({"name": NAME, "precision": "int8"}))
    return tmp_path / "cache"


def run(*arguments: str, stdout: int = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[bytes]:
    given = [sys.executable, "-m", "adi", *arguments]
    return subprocess.run(given, env={**os.environ, **environment}, stdout=stdout, stderr=subprocess.PIPE, check=False)


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"mod\\xe8le \\u65e5\\u672c"), ("cp1252", b"mod\xe8le \\u65e5\\u672c")]
)
def test_text_that_a_console_cannot_hold_is_shown_escaped(encoding: str, shown: bytes, cache: Path) -> None:
    done = run("cache", ADI_CACHE=str(cache), PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_comes_back_whole_from_any_console(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    for value in ({"text": NAME}, {"text": "half a pair \ud83d"}):
        show_json(value)
        sys.stdout.flush()
        assert json.loads(raw.getvalue().decode(encoding)) == value
        raw.seek(raw.truncate(0))


def test_a_streamed_text_is_escaped_piece_by_piece() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, "ascii", errors="backslashreplace")
    painter = Painter(Console(file=file), ())
    rest: Any = {
        "level": "full",
        "drafted": False,
        "accepted": False,
        "signals": {},
        "looks": (),
        "rejected": (),
        "seconds": 0.0,
    }
    for text in ("caf\u00e9 ", "\u65e5", "!"):
        painter.show(Step(index=0, token=0, text=text, depth=4, round=0, **rest))
    painter.close()
    assert raw.getvalue() == b"caf\\xe9 \\u65e5!\n"


def test_input_in_another_encoding_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    with pytest.raises(UsageError, match=r"standard input is not text: 'utf-8' codec .* PYTHONIOENCODING"):
        read_input()
    monkeypatch.setattr(sys, "stdin", None)
    assert not read_input()


@pytest.mark.parametrize("arguments", [["cache"], ["cache", "--help"], ["plot", "/dev/null"]])
def test_a_closed_pipe_ends_quietly(arguments: list[str], cache: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run(*arguments, stdout=write, ADI_CACHE=str(cache))
    os.close(write)
    assert done.returncode == (2 if "plot" in arguments else 1)  # an error is told, whoever reads the output
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


# A10
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_standard_output_is_a_sentence(cache: Path) -> None:
    given = [sys.executable, "-m", "adi", "cache"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            given, env=os.environ | {"ADI_CACHE": str(cache)}, stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    assert done.stderr.decode() == "error: [Errno 28] No space left on device\n"
