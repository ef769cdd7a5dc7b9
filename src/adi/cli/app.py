"""``adi``: the commands, their groups of options, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

import adi
from adi.cli.shared.options import option
from adi.cli.shared.output import err, say
from adi.errors import AdiError, UsageError
from adi.files import FULL

# Each is a function in the module of its name.
COMMANDS = (
    *("run", "chat", "serve", "trace", "plot", "inspect", "triggers"),
    *("bench", "audit", "quality", "history", "cache", "calibrate", "tune", "habituate", "train", "solve", "study"),
)
HOMES = {"train": "looped.train", "solve": "looped.solve", "tune": "training.tune", "habituate": "training.habituate"}
GROUPS = {"study": ("exposure", "familiarity", "knowledge", "sparsity")}  # groups of commands, each in a folder of modules


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with a mistake of the user's as exit code 2 and an interruption as 130; no traceback for either.

    A mistake is an ``AdiError``, or an error of the system's that names a file or a full disk. All else is a bug, and shows
    its traceback.
    """

    @functools.wraps(command)
    def run_guarded(**values: Any) -> None:
        try:
            command(**values)
        except (AdiError, OSError) as error:
            if isinstance(error, OSError) and error.filename is None and error.errno not in FULL:
                raise
            console = err()
            console.print("error: ", style="bold red", end="")
            say(console, error)
            _drop_unwritten()
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            say(
                err(),
                "\nstopped. Files that were finished stay; tune, train, habituate, study and bench --json resume from them.",
            )
            raise typer.Exit(130) from None

    return run_guarded


def _drop_unwritten() -> None:
    """Let go of what standard output could not take, on a full disk: Python would try again at its end, and fail with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it: the fields of its option groups (dataclasses) one by one, --config and --help-all."""
    parameters, groups = list[inspect.Parameter](), dict[str, Any]()
    for name, parameter in inspect.signature(command).parameters.items():
        hint = get_type_hints(command, include_extras=True)[name]
        if is_dataclass(hint):
            groups[name] = hint
            own = get_type_hints(hint, include_extras=True)
            parameters += [_keyword(field.name, own[field.name], field.default) for field in fields(hint)]
        else:
            parameters.append(_keyword(name, hint, parameter.default))
    parameters += [_keyword("config", ConfigOption, None), _keyword("help_all", HelpAllOption, False)]

    @functools.wraps(command)
    def run_grouped(config: object, help_all: object, **values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)}) for name, group in groups.items()
        }
        command(**made, **values)

    run_grouped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run_grouped


def _keyword(name: str, hint: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _configure(context: typer.Context, path: Path | None) -> Path | None:
    """Take what the file gives as defaults of the options."""
    if path is not None and not context.resilient_parsing:
        try:
            context.default_map = settings(path, context.command.params)
        except AdiError as error:
            raise typer.BadParameter(str(error)) from None
    return path


def settings(path: Path, parameters: Iterable[Any]) -> dict[str, Any]:
    """The options that a TOML file gives, by parameter; AdiError for an unknown key or a value that no option takes."""
    import tomllib

    from adi.files import expanded, read_text

    known = {names[0]: p for p in parameters if (names := [name[2:] for name in p.opts if name.startswith("--")])}
    for name in ("config", "help-all", "help"):
        known.pop(name, None)
    try:
        given = tomllib.loads(read_text(expanded(path), "configuration"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}.") from None
    if unknown := [key for key in given if key not in known]:
        raise UsageError(f"{path} sets {unknown[0]!r}, which is no option of this command; it has {', '.join(known)}.")
    found: dict[str, Any] = {}
    for key, value in given.items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, (list, dict)) for v in values) or (isinstance(value, list) and not known[key].multiple):
            raise UsageError(f"{path} sets {key} to {value!r}, which is not one value.")
        found[known[key].name] = list(map(str, values)) if known[key].multiple else str(value)  # typer converts and checks
    return found


def _help_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help())
        raise typer.Exit


ConfigOption = Annotated[
    Path | None,
    option(
        "--config",
        help="A TOML file of options, such as top-k = 40; what the command line gives wins.",
        metavar="FILE",
        is_eager=True,
        callback=_configure,
    ),
]
HelpAllOption = Annotated[
    bool, option("--help-all", help="Show rarely used options too.", is_eager=True, callback=_help_all, show_default=False)
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adi {adi.__version__}")
        raise typer.Exit


def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Adaptive depth inference for decoder language models."""


class _Command(TyperCommand):
    """A command whose refusals name the value that was given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            found: Any = getattr(error.__cause__, "errors", list)()  # of pydantic, whose own words do not say what was given
            if found:
                said, given = error.message.removeprefix("Value error, ").rstrip("."), repr(found[0]["input"])
                error.message = f"{said}." if given in said else f"got {given}; {said[:1].lower()}{said[1:]}."
            raise


def application(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The program with these commands."""
    program = _typer("adi", "Adaptive depth inference: self-speculative decoding with exactly the full model's text.")
    program.callback()(options)
    for name in names:
        if name not in GROUPS:
            _add(program, name, HOMES.get(name, name))
            continue
        group = _typer(name, (import_module(f"adi.cli.{name}").__doc__ or "").partition(": ")[2])
        for inner in GROUPS[name]:
            _add(group, inner, f"{name}.{inner}")
        group.callback()(lambda: None)  # with it a group of one command stays a group
        program.add_typer(group)
    return program


def _typer(name: str, about: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=about,
    )


def _add(program: typer.Typer, name: str, module: str) -> None:
    program.command(name, cls=_Command)(with_groups(guarded(getattr(import_module(f"adi.cli.{module}"), name))))


def asked_for(arguments: Sequence[str]) -> tuple[str, ...]:
    """The commands that a command line needs: reading the options of all of them would hold up each."""
    first = next(iter(arguments), "")
    return (first,) if first in COMMANDS else COMMANDS


def __getattr__(name: str) -> Any:
    if name == "app":
        return application()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """The ``adi`` command."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(errors="backslashreplace")  # for what a console's encoding cannot hold
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    application(asked_for(sys.argv[1:]))()
