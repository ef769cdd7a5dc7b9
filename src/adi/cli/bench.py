"""``adi bench``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from adi.cli.options import BackendOption, ModelArgument
from adi.errors import AdiError
from adi.files import require_writable, write_json
from adi.prompts import PromptItem, read_prompts, spread

if TYPE_CHECKING:
    from adi.progress import Progress as ForcedRead

MODES_HELP = "Of adi: full, verified, reflex, lookup, static."
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8", "int4")


def bench(
    model: ModelArgument = "smollm2-135m",
    prompts: Annotated[str, typer.Option("--prompts", help="A JSONL file; or 'bench', 80 prompts.")] = "bench",
    modes: Annotated[str, typer.Option("--modes", help=MODES_HELP)] = "full,verified",
    peers: Annotated[str, typer.Option("--peers", help="Other tools, such as llama.cpp,hf:fp32; or 'all'.")] = "",
    precision: Annotated[str, typer.Option("--precision", help="Of adi's modes; several with commas.")] = "fp32",
    backend: BackendOption = "auto",
    exits: Annotated[str | None, typer.Option("--exits", "-e", help="Trained exits; by default those shipped.")] = None,
    risk: Annotated[float | None, typer.Option("--risk", help="For reflex mode: a level that adi calibrate certified.")] = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="For reflex mode, uncertified.")] = None,
    static: Annotated[
        str | None, typer.Option("--static", metavar="DEPTH,K", help="For static mode; at 0 the drafter.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Find static mode's depth and draft length first.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 128,
    prompt_tokens: Annotated[int | None, typer.Option("--prompt-tokens", help="Make every prompt exactly so long.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Use so many prompts, spread over the file.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Runs of every prompt.")] = 1,
    restarts: Annotated[int, typer.Option("--restarts", help="Deal the prompts out to so many processes of each.")] = 1,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Of full depth, so many at once too, against one by one.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", help="Processor threads for everybody.")] = 2,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result here; an interrupted run resumes.")
    ] = None,
) -> None:
    """Compare modes and tools on the same prompts, in turn, in one run; ratios are medians over prompts."""
    items = _prompts(prompts, limit)
    _at_least_one(
        repeats=repeats, restarts=restarts, threads=threads, max_new_tokens=max_new_tokens, prompt_tokens=prompt_tokens
    )
    chosen, pair = _listed(modes), None if static is None else _pair(static)
    _check_modes(chosen, pair, sweep, batch)
    _check_reflex(chosen, risk, threshold)
    if not (precisions := _known("precision", _listed(precision), PRECISIONS)):
        raise AdiError(f"--precision is empty; choose among {', '.join(PRECISIONS)}.")
    from adi.artifact import shipped
    from adi.measure.bench.peers import PEERS
    from adi.measure.bench.run import Extent, finished
    from adi.measure.bench.run import bench as measure
    from adi.measure.bench.systems import MODES, Setting

    names = [f"adi:{mode}:{p}" for p in precisions for mode in _known("mode", chosen, MODES)]
    names += list(PEERS) if peers == "all" else _known("peer", _listed(peers), tuple(PEERS))
    trained = exits if exits is not None else (model if model in shipped() else None)
    setting = Setting(model, trained, threshold, threads, seed, backend, pair, risk=risk)
    if json_out is not None:
        require_writable(json_out)
    with _shown(Console(stderr=True)) as forced_read:
        extent = Extent(max_new_tokens, repeats, prompt_tokens, sweep, restarts, batch)
        command = shlex.join(["adi", *sys.argv[1:]])
        found = measure(names, items, setting, extent, command=command, result=json_out, progress=forced_read)
    if json_out is not None:
        write_json(json_out, found)
        finished(json_out)
    _print(Console(highlight=False), found)


def _prompts(source: str, limit: int | None) -> list[PromptItem]:
    _at_least_one(limit=limit)
    items = read_prompts(source)
    return items if limit is None else spread(items, limit)


def _check_modes(chosen: Sequence[str], pair: tuple[int, int] | None, sweep: bool, batch: int | None) -> None:
    if not chosen:
        raise AdiError("--modes is empty; at least one of adi's modes must run.")
    if batch is not None and "full" not in chosen:
        raise AdiError(f"--batch {batch} is measured with full depth; put full into --modes, or leave --batch out.")
    if ("static" in chosen) != (sweep or pair is not None) or (sweep and pair is not None):
        raise AdiError("static mode needs either --static DEPTH,K or --sweep, and these need static mode.")


def _check_reflex(chosen: Sequence[str], risk: float | None, threshold: float | None) -> None:
    if "reflex" in chosen and (risk is None) == (threshold is None):
        raise AdiError("reflex mode needs --risk R (certified by adi calibrate, such as 0.02) or --threshold T, one of them.")
    if "reflex" not in chosen and (risk, threshold) != (None, None):
        raise AdiError("--risk and --threshold are of reflex mode; put reflex into --modes, or leave them out.")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _known(what: str, given: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    if unknown := [name for name in given if name not in known]:
        raise AdiError(f"{what} {unknown[0]!r} is not known; choose among {', '.join(known)}.")
    return given


def _at_least_one(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise AdiError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")


def _pair(text: str) -> tuple[int, int]:
    try:
        depth, draft_tokens = (int(part) for part in text.split(","))
    except ValueError:
        raise AdiError(f"--static is DEPTH,K, such as 24,4, not {text!r}.") from None
    if depth < 0 or draft_tokens < 1:
        raise AdiError(f"--static is {text}; the depth must be at least 0 (the drafter), the number of drafts at least 1.")
    return depth, draft_tokens


@contextmanager
def _shown(console: Console) -> Iterator[ForcedRead]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total or None, description=what)


def _print(out: Console, found: dict[str, Any]) -> None:
    title = f"{found['prompts']} prompts, {found['max_new_tokens']} tokens at most"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("", "tokens\n/s", "first\nms", "a\nround", "drafts\nkept", "same\ntext", "same\nstart", "peak\nMiB")
    for name in columns:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for run in found["runs"]:
        if run["error"] is None:
            table.add_row(
                run["name"],
                f"{run['tokens_per_second']:.1f}",
                f"{1e3 * run['ttft_seconds']:.0f}",
                "" if run["tokens_per_round"] is None else f"{run['tokens_per_round']:.2f}",
                _percent(run["accepted_share"]),
                _percent(run["match"]),
                _percent(run["match_tokens"]),
                f"{run['peak_bytes'] / 2**20:.0f}",
            )
    out.print(table)
    for run in found["runs"]:
        if run["error"] is not None:
            out.print(f"{run['name']} did not run: {run['error']}", markup=False, soft_wrap=True)
        elif "static" in run:
            depth, draft_tokens = run["static"]
            out.print(f"{run['name']} drafts {draft_tokens} tokens from depth {depth}", markup=False)
    for ratio in found["ratios"]:
        if ratio["b"].startswith("adi:") and not ratio["b"].startswith("adi:full:"):
            continue  # in the file; here what is compared with full depth and with other tools
        times = f"{ratio['median']:.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f}), first token {ratio['ttft_median']:.2f} x"
        out.print(f"{ratio['a']} / {ratio['b']}: {times}", markup=False, soft_wrap=True)
    _print_batches(out, found["batches"])


def _print_batches(out: Console, batches: Sequence[dict[str, Any]]) -> None:
    ran = [entry for entry in batches if entry["groups"]]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "at\nonce", "groups", "alone\ntokens/s", "batch\ntokens/s", "ratio", "same\ntokens"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for entry in ran:
        speeds = [f"{entry[f'{how}_tokens_per_second']:.1f}" for how in ("alone", "batch")]
        ratio = f"{entry['median']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})"
        same = "yes" if entry["same"] else "no"
        table.add_row(entry["name"], str(entry["batch"]), str(entry["groups"]), *speeds, ratio, same)
    if ran:
        out.print(table)
    for entry in batches:
        if entry["error"] is not None:
            out.print(f"{entry['name']} in batches: {entry['error']}", markup=False, soft_wrap=True)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
