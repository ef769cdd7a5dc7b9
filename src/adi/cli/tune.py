"""``adi tune``."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from adi.cli.options import DeviceOption, ModelArgument, Source, parse_depths, require_folder
from adi.errors import AdiError
from adi.prompts import read_prompts

COLUMNS = (
    TextColumn("{task.description:10}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[note]}"),
)
PLAIN: Any = {"highlight": False, "markup": False, "soft_wrap": True}
TalkOption = Annotated[
    int, typer.Option("--talk", help="Tokens of texts that it writes by itself, to learn from instead of answers.")
]
TalkPrecisionOption = Annotated[
    str, typer.Option("--talk-precision", help="Engines' precisions that talk, with commas; each its share of --talk.")
]
OwnPromptsOption = Annotated[
    float | None, typer.Option("--own-prompts", help="With --talk: share of those texts whose prompt it writes too, 0 to 1.")
]

JudgeOption = Annotated[
    bool,
    typer.Option(
        "--judge-only",
        help="Train nothing: measure the drafter of --keep again, on --talk tokens of new text from a --seed of its own.",
    ),
]


def tune(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the exits; a run that was stopped goes on there.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompts", help="JSONL prompt file, 'train' (built in, 480); may be repeated."),
    ] = None,
    text: Annotated[list[Path] | None, typer.Option("--text", help="Plain text to learn from; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of its own answers that the model trains on.")] = 100_000,
    depths: Annotated[str | None, typer.Option("--depths", help="Where to put exits, such as 8,16,24.")] = None,
    shortlist: Annotated[int, typer.Option("--shortlist", help="Tokens that a head can name.")] = 4096,
    rank: Annotated[int, typer.Option("--rank", help="Rank of each head's adapter.")] = 128,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the data.")] = 3,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Peak learning rate.")] = 3e-3,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")] = 160,
    drafter_epochs: Annotated[int, typer.Option("--drafter-epochs", help="Passes for the drafter; 0 trains none.")] = 4,
    talk: TalkOption = 0,
    talk_precision: TalkPrecisionOption = "auto",
    own_prompts: OwnPromptsOption = None,
    warm_start: Annotated[bool, typer.Option("--warm-start", help="Begin with the drafter of --keep.")] = False,
    keep: Annotated[str | None, typer.Option("--keep", help="Exits whose heads stay: only a drafter is trained.")] = None,
    judge_only: JudgeOption = False,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Train exits for a model: it answers prompts, and its heads learn what full depth says of those answers.

    Without --prompts and --text the 480 built-in prompts are used. Stop it when you like: the same command goes on.
    """
    from adi.artifact import load_exits
    from adi.training.tune import TuneOptions, judge_drafter
    from adi.training.tune import tune as train

    console = Console(stderr=True)
    require_folder(out)
    sets = [read_prompts(name) for name in (prompts if prompts is not None else [] if text or judge_only else ["train"])]
    loaded = Source(model, backend="hf", device=device).load(console)
    options = TuneOptions(
        depths=parse_depths(depths),
        tokens=tokens,
        max_new_tokens=max_new_tokens,
        shortlist=shortlist,
        rank=rank,
        epochs=epochs,
        learning_rate=learning_rate,
        drafter_epochs=drafter_epochs,
        talk_tokens=talk,
        own_prompts=own_prompts,
        warm_start=warm_start,
        seed=seed,
    )
    talks = talk_precision.split(",") if talk and drafter_epochs else []
    voices = [Source(model, precision=precision.strip()).load(console) for precision in talks]
    more: dict[str, Any] = {
        "voices": voices,
        "made_by": _made_by(),
        "categories": {i.prompt: i.category for s in sets for i in s},
    }
    groups = [[item.prompt for item in items] for items in sets]
    if judge_only and keep is None:
        raise AdiError("--judge-only measures the drafter of exits: give them with --keep.")
    kept = None if keep is None else load_exits(keep)
    with Progress(*COLUMNS, console=console) as bar:
        more["progress"] = _Teller(bar, _log(out))
        if judge_only:
            assert kept is not None
            exits = judge_drafter(loaded, out, groups, options, keep=kept, **more)
        else:
            exits = train(loaded, out, groups, options, keep=kept, texts=text or (), **more)
    _report(console, exits.report)
    console.print(f"Saved to {out}. Use them: adi run --model {model} --exits {out} 'your prompt'", **PLAIN)


def _made_by() -> dict[str, Any]:
    versions = {name: version(name) for name in ("adi-lm", "torch", "transformers")}
    return {"command": shlex.join(["adi", *sys.argv[1:]]), "versions": versions}


def _report(console: Console, report: Mapping[str, Any]) -> None:
    console.print(_table(report))
    if "drafter" in report:
        console.print(_drafter(report["drafter"]), highlight=False)
    for table in _categories(report):
        console.print(table)


class _Teller:
    """Shows progress in the terminal, and writes a line to the log every now and then."""

    def __init__(self, bar: Progress, log: logging.Logger) -> None:
        self._bar, self._log = bar, log
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total, note="")
        self._bar.update(self._tasks[stage], completed=done, total=total, note=note)
        self._log.info("%s %d/%d %s", stage, done, total, note)


def _log(out: Path) -> logging.Logger:
    (out / "work").mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger(f"adi.tune.{out}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.FileHandler(out / "work" / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    return logger


def _drafter(judged: dict[str, Any]) -> str:
    steps = ", ".join(f"{share:.1%}" for share in judged["agreement_by_step"])
    return (
        f"Drafter: agreement by step, those before it having agreed: {steps}; {judged['accepted_in_a_row']:.2f} accepted of 5 "
        f"in a row, {judged['positions']} held-out tokens."
    )


def _categories(report: Mapping[str, Any]) -> list[Table]:
    """By category of prompt: how often the drafter is right at its steps, and the exits at their depths; where any is known."""
    drafts = {kind: _drafted(found) for kind, found in report.get("drafter", {}).get("by_category", {}).items()}
    depths = {str(row["depth"]): row.get("by_category", {}) for row in report["depths"]}
    kinds = sorted({kind for found in depths.values() for kind in found})
    agreed = {kind: [f"{found[kind]:.0%}" if kind in found else "" for found in depths.values()] for kind in kinds}
    steps = max((len(cells) - 2 for cells in drafts.values()), default=0)
    names = ["tokens", *(str(step + 1) for step in range(steps)), "in a row"]
    tables = [
        ("Drafter, by kind of prompt and step", names, drafts),
        ("Exits, by kind of prompt and depth", list(depths), agreed),
    ]
    return [_by_kind(title, columns, rows) for title, columns, rows in tables if rows]


def _drafted(found: Mapping[str, Any]) -> list[str]:
    shares = [f"{share:.0%}" for share in found["agreement_by_step"]]
    return [str(found["positions"]), *shares, f"{found['accepted_in_a_row']:.2f}"]


def _by_kind(title: str, columns: Iterable[str], rows: Mapping[str, Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for kind, cells in rows.items():
        table.add_row(kind, *cells)
    return table


def _table(report: object) -> Table:
    assert isinstance(report, dict)
    held = report["held_out"]
    table = Table(
        title=f"Agreement with the full model's greedy token, {held['rows']} held-out tokens "
        f"({held['shortlist_coverage']:.1%} of them in the shortlist)",
        title_justify="left",
    )
    for name in ("depth", "exit", "bare head", "KL, nats", "entropy up to", "decides", "then right"):
        table.add_column(name, justify="right")
    for row in report["depths"]:
        table.add_row(
            str(row["depth"]),
            f"{row['agreement']:.1%}",
            f"{row['bare_agreement']:.1%}",
            f"{row['divergence']:.2f}",
            "not asked" if row["threshold"] is None else f"{row['threshold']:.2f}",
            "" if row["threshold"] is None else f"{row['fires']:.1%}",
            "" if row["threshold"] is None else f"{row['precision']:.1%}",
        )
    return table
