"""``adi``: the commands, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import adi

# Every command's name, which its function has too, and the module that holds it.
COMMANDS = {
    "run": "run",
    "chat": "chat",
    "trace": "trace",
    "plot": "trace",
    "inspect": "inspect",
    "triggers": "triggers",
    "bench": "bench",
    "audit": "audit",
    "quality": "quality",
    "history": "history",
    "calibrate": "calibrate",
    "tune": "tune",
}


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with a mistake of the user's as exit code 2 and an interruption as 130; no traceback for either."""

    @functools.wraps(command)
    def run_guarded(*args: Any, **kwargs: Any) -> None:
        console = Console(stderr=True, highlight=False)
        try:
            command(*args, **kwargs)
        except (ValueError, OSError) as error:
            console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            console.print("\nstopped. Files that were finished are kept; adi tune and adi bench --json go on where they were.")
            raise typer.Exit(130) from None

    return run_guarded


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adi {adi.__version__}")
        raise typer.Exit


def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Adaptive depth inference for decoder language models."""


def application(names: Iterable[str] = tuple(COMMANDS)) -> typer.Typer:
    """The program with these commands."""
    program = typer.Typer(
        name="adi",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Adaptive depth inference: draft from shallow layers where the model is sure, verify with the deep ones.",
    )
    program.callback()(options)
    for name in names:
        program.command(name)(guarded(getattr(import_module(f"adi.cli.{COMMANDS[name]}"), name)))
    return program


def asked_for(arguments: Sequence[str]) -> tuple[str, ...]:
    """The commands that a command line needs: reading the options of all of them would hold up each."""
    first = next(iter(arguments), "")
    return (first,) if first in COMMANDS else tuple(COMMANDS)


def __getattr__(name: str) -> Any:
    if name == "app":
        return application()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """The ``adi`` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    application(asked_for(sys.argv[1:]))()
