"""``adi``: the commands, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import adi
from adi.cli import audit, bench, calibrate, chat, habits, plot, quality, run, study, train, triggers

app = typer.Typer(
    name="adi",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adaptive depth inference: draft from shallow layers where the model is sure, verify with the deep ones.",
)


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


app.command("run")(guarded(run.run))
app.command("chat")(guarded(chat.chat))
app.command("trace")(guarded(plot.trace))
app.command("plot")(guarded(plot.plot))
app.command("inspect")(guarded(study.inspect))
app.command("triggers")(guarded(triggers.triggers))
app.command("bench")(guarded(bench.bench))
app.command("audit")(guarded(audit.audit))
app.command("quality")(guarded(quality.quality))
app.command("habits")(guarded(habits.habits))
app.command("calibrate")(guarded(calibrate.calibrate))
app.command("tune")(guarded(train.tune))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adi {adi.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Adaptive depth inference for decoder language models."""


def main() -> None:
    """The ``adi`` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
