"""What all commands share: which errors are the user's, configuration files, option groups."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

import adi
from adi.cli import plot
from adi.cli.app import COMMANDS, GROUPS, application
from adi.errors import FileError, MemoryFullError, ModelError, UsageError
from support import adi_


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The result of a command that raises ``error``."""

    def command(file: Annotated[Path, typer.Argument()]) -> None:
        raise error

    monkeypatch.setattr(plot, "plot", command)
    return CliRunner().invoke(application(["plot", "run"]), ["plot", "x"])


@pytest.mark.parametrize(
    "bug", [ValueError("zip() argument 2 is shorter than argument 1"), TypeError("x"), OSError("pipe"), RuntimeError("CUDA")]
)
def test_a_bug_inside_a_command_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    done = failing(bug, monkeypatch)
    assert done.exception is bug
    assert done.exit_code == 1
    assert "error:" not in done.output


def test_a_bug_shows_its_traceback_at_the_real_front_door() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['adi', 'plot', 'x']\n"
        "import adi.measure.bench.report as report\n"
        "report.is_result = lambda file: list(zip([1], [], strict=True))\n"
        "from adi.cli.app import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: zip() argument 2 is shorter" in done.stderr


@pytest.mark.parametrize(
    "mistake",
    [
        *(
            UsageError("no [bold] option"),
            FileError("no [bold] file"),
            ModelError("no [bold] model"),
            MemoryFullError("[bold]"),
        ),
        FileNotFoundError(errno.ENOENT, "No such file", "[bold]"),
        PermissionError(errno.EACCES, "Permission denied", "[bold]"),
        OSError(errno.ENOSPC, "No space left on device: [bold]"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(mistake: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    done = failing(mistake, monkeypatch)
    assert done.exit_code == 2
    assert done.stderr == f"error: {mistake}\n"
    assert not done.stdout


def test_a_configuration_file_gives_options_and_the_command_line_wins(tiny_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'model = "{tiny_folder}"\nmode = "full"\nmax-new-tokens = 3\njson = true\nstop = ["zzz"]\ntop-p = 1\n')
    document = json.loads(adi_("run", "hello", "--config", config).stdout)
    assert (document["mode"], document["tokens"]) == ("full", 3)
    document = json.loads(adi_("run", "hello", "-n", 5, "--config", config, "--mode", "lookup").stdout)
    assert (document["mode"], document["tokens"]) == ("lookup", 5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("top-kk = 3", "'top-kk', which is no option of this command; it has "),
        ("config = 'x'", "'config', which is no option"),
        ("top-k = 3.7", "Invalid value for '--top-k'"),
        ("top-k = [3, 4]", "[3, 4], which is not one value"),
        ("mode = 'fast'", "'fast' is not one of"),
        ("top-k = ", "is not TOML"),
        ("max-new-tokens = -1", "Invalid value for '--max-new-tokens'"),
    ],
)
def test_a_configuration_without_meaning_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    done = CliRunner().invoke(application(), ["run", "hi", "--config", str(tmp_path / "c.toml")], env={"COLUMNS": "600"})
    assert done.exit_code == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.output
    missing = adi_("run", "hi", "--config", tmp_path / "none.toml")
    assert missing.exit_code == 2
    assert "cannot read the configuration" in missing.stderr


@pytest.mark.parametrize(
    "name", [*(c for c in COMMANDS if c not in GROUPS), *(f"{g} {c}" for g, inner in GROUPS.items() for c in inner)]
)
def test_help_is_short_and_all_of_it_is_there_on_request(name: str) -> None:
    short, whole = adi_(*name.split(), "--help").stdout, adi_(*name.split(), "--help-all").stdout
    assert short.count(" --") <= 26
    assert set(short.split()) <= set(whole.split()) | {"│"}
    assert "--config" in short
    if name == "run":
        assert "--min-p" in whole
        assert "--min-p" not in short


def test_an_unknown_set_of_prompts_is_refused_with_both_names() -> None:
    for command in (["bench"], ["triggers"], ["inspect"], ["tune", "smollm2-135m", "--out", "x"]):
        done = adi_(*command, "--prompts", "builtin")
        assert done.exit_code == 2, done.output
        assert "'train' (480 prompts to train on), 'bench' (80 to measure with)" in done.stderr


def test_loading_is_reported_in_a_pipe(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    done = adi_("run", "hello", "--model", tiny_folder, "--mode", "full", "-n", 2)
    assert done.exit_code == 0, done.output
    assert "Exporting" in done.stderr
    assert "Exporting" not in adi_("run", "hello", "--model", tiny_folder, "--mode", "full", "-n", 2).stderr


def test_the_front_door_has_its_types() -> None:
    assert os.fspath(Path(adi.__file__).with_name("py.typed")).endswith("py.typed")
