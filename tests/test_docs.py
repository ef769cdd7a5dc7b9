"""The pages are what the files hold and what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import adi
from adi.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAST = {ROOT / "docs" / "benchmarks.md", *(ROOT / "docs" / "log").glob("*.md")}  # quote commands of the day they were run
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {
    name: {
        option
        for one in (command, *getattr(command, "commands", {}).values())
        for parameter in one.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for name, command in COMMANDS.items()
}


def test_generated_pages_are_current() -> None:
    check = [sys.executable, ROOT / "tools" / "benchmarks.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]+)?\)", page.read_text()):
        where = page if not target else page.parent / target
        if "://" in target:
            continue
        assert where.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor[1:] in _anchors(where.read_text()), f"{page.name}: {target}{anchor}"


@pytest.mark.parametrize("page", [p for p in PAGES if p not in PAST], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_commands_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"\b((?:tests|tools|docs)/[\w./]*\w|src/adi/[\w/]*\w(?:\.\w+)?)", text):
        assert (ROOT / name).exists() or any(ROOT.glob(name)) or "/results/" in name, f"{page.name}: {name}"
    code = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL) + re.findall(r"`(adi [^`\n]+)`", text)
    for command, rest in re.findall(r"^adi (\w+)((?:\\\n|[^\n#])*)", "\n".join(code), flags=re.MULTILINE):
        assert command in COMMANDS, f"{page.name}: adi {command}"
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)) - OPTIONS[command]
        assert not unknown, f"{page.name}: adi {command} has no {unknown}"


def test_the_readme_names_every_command() -> None:
    assert set(re.findall(r"`adi (\w+)", README)) == set(COMMANDS)


def test_the_readme_names_no_option_that_does_not_exist() -> None:
    used = set(re.findall(r"`(--[a-z][\w-]*)", README))
    assert used <= set().union(*OPTIONS.values())


def test_every_result_that_is_kept_can_be_made_again() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for file in (ROOT / "docs" / "results").glob("*.json"):
        assert file.name == "made.json" or f"$(RESULTS)/{file.name}" in makefile, f"make results does not make {file.name}"


def test_the_readmes_python_runs(
    tiny_model: adi.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.setattr(adi, "load", lambda source: tiny_model, raising=False)
    exec(compile(code, "README.md", "exec"), {})
    assert "tokens in" in capsys.readouterr().out


@pytest.mark.real
@pytest.mark.slow  # on a tiny model above
def test_the_readmes_python_runs_with_the_default_model(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "tokens in" in capsys.readouterr().out


def _anchors(text: str) -> set[str]:
    """The anchors that a Markdown page offers for its headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
