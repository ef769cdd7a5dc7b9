"""How commands print: results on standard output, messages on standard error, tables, files of results."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from adi.errors import UsageError


def out() -> Console:
    return Console(highlight=False)


def err() -> Console:
    return Console(stderr=True, highlight=False)


def say(console: Console, text: object, style: str | None = None) -> None:
    """A line of plain text: nothing in it is markup, and a terminal wraps it."""
    console.print(str(text), style=style, markup=False, soft_wrap=True)


def show_json(value: object) -> None:
    """One JSON document on standard output, escaped where the encoding there cannot hold it."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)


def read_input() -> str:
    """All of standard input; UsageError where it is no text in the encoding of this console."""
    try:
        return sys.stdin.read() if sys.stdin else ""  # closed
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not text: {error}. Convert it, or set PYTHONIOENCODING.") from None


def table(
    title: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    left: Collection[str] = ("",),
    wrap: bool = True,
) -> Table:
    """A table whose columns of numbers are set to the right, and those named ``left`` to the left."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        made.add_column(name, justify="left" if name in left else "right", no_wrap=not wrap)
    for row in rows:
        made.add_row(*map(str, row))
    return made


def percent(share: float | None, digits: int = 0) -> str:
    """A share as "12%"; nothing for None."""
    return "" if share is None else f"{share:.{digits}%}"


def command_line() -> str:
    """What was typed, for the record."""
    return shlex.join(["adi", *sys.argv[1:]])
