"""What the README says is what the files hold and what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from adi.cli.app import app
from adi.measure.standings import page as drawn
from adi.measure.standings import read_result

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tables_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_reflex_page_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "reflex_page.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_page_of_plots_is_current() -> None:
    results = ROOT / "docs" / "results"
    assert (results / "ladder.html").read_text() == drawn(read_result(results / "ladder.json"))


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_names_every_command() -> None:
    names = {command.name for command in app.registered_commands}
    assert set(re.findall(r"`adi (\w+)", README)) == names


@pytest.mark.real
def test_the_readmes_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "tokens in" in capsys.readouterr().out
