"""``adi bench``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from adi.cli.options import MODES, ModelArgument
from adi.files import require_writable, write_json
from adi.prompts import read_prompts


def bench(
    model: ModelArgument = "smollm2-135m",
    prompts: Annotated[str, typer.Option("--prompts", help="A JSONL prompt file, 'bench' or 'builtin'.")] = "bench",
    modes: Annotated[str, typer.Option("--modes", help=f"Of adi: {', '.join(MODES)}.")] = "full,verified",
    peers: Annotated[str, typer.Option("--peers", help="Other tools, such as hf:fp32,hf:bf16,hf-lookup:fp32.")] = "",
    precision: Annotated[str, typer.Option("--precision", help="Of adi's modes; several with commas.")] = "fp32",
    exits: Annotated[str | None, typer.Option("--exits", "-e", help="Trained exits; by default those shipped.")] = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="For reflex mode.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 128,
    limit: Annotated[int | None, typer.Option("--limit", help="Use so many prompts, spread over the file.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Runs of every prompt.")] = 1,
    threads: Annotated[int, typer.Option("--threads", help="Processor threads for everybody.")] = 2,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the whole result here.")] = None,
) -> None:
    """Compare modes and tools on the same prompts, in turn, in one run; ratios are medians over prompts."""
    from adi.exits.artifact import shipped
    from adi.measure.bench import bench as measure
    from adi.measure.contestants import Setting

    items = read_prompts(prompts)
    for name, value in (("--limit", limit if limit is not None else 1), ("--repeats", repeats), ("--threads", threads)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if limit is not None and limit < len(items):
        items = [items[int((i + 0.5) * len(items) / limit)] for i in range(limit)]
    chosen = [m.strip() for m in modes.split(",") if m.strip()]
    if unknown := [m for m in chosen if m not in MODES]:
        raise ValueError(f"mode {unknown[0]!r} is not known; choose among {', '.join(MODES)}.")
    names = [f"adi:{mode}:{p.strip()}" for p in precision.split(",") for mode in chosen]
    names += [peer.strip() for peer in peers.split(",") if peer.strip()]
    if not chosen:
        raise ValueError("--modes is empty; at least one of adi's modes must run.")
    if json_out is not None:
        require_writable(json_out)
    trained = exits if exits is not None else (model if model in shipped() else None)
    errors = Console(stderr=True)
    with Progress(
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"), console=errors
    ) as bar:
        task = bar.add_task("loading", total=None)
        found = measure(
            names,
            items,
            Setting(model, trained, threshold, threads, seed),
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            command=shlex.join(["adi", *sys.argv[1:]]),
            progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
        )
    if json_out is not None:
        write_json(json_out, found)
    _print(Console(highlight=False), found)


def _print(out: Console, found: dict[str, Any]) -> None:
    table = Table(title=f"{found['prompts']} prompts, {found['max_new_tokens']} tokens at most", title_justify="left")
    for name in ("", "tokens/s", "first token, s", "tokens a round", "accepted", "same text", "peak MiB"):
        table.add_column(name, justify="right" if name else "left")
    for run in found["runs"]:
        if run["error"] is not None:
            continue
        table.add_row(
            run["name"],
            f"{run['tokens_per_second']:.1f}",
            f"{run['ttft_seconds']:.2f}",
            "" if run["tokens_per_round"] is None else f"{run['tokens_per_round']:.2f}",
            "" if run["accepted_share"] is None else f"{run['accepted_share']:.0%}",
            "" if run["match"] is None else f"{run['match']:.0%}",
            f"{(run['peak_bytes'] or 0) / 2**20:.0f}",
        )
    out.print(table)
    for run in found["runs"]:
        if run["error"] is not None:
            out.print(f"{run['name']} did not run: {run['error']}", markup=False)
    for ratio in found["ratios"]:
        low, high = ratio["low"], ratio["high"]
        out.print(f"{ratio['a']} / {ratio['b']}: {ratio['median']:.2f} x ({low:.2f} to {high:.2f})", markup=False)
