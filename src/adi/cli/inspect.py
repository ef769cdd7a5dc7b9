"""``adi inspect``, and what it shares with ``adi triggers``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from adi.cli.options import (
    BackendOption,
    DeviceOption,
    ModelArgument,
    PrecisionOption,
    Source,
)
from adi.errors import AdiError
from adi.progress import Reporter
from adi.prompts import PromptItem, read_prompts, spread

if TYPE_CHECKING:
    from adi.measure.inspect import Headroom

PromptsOption = Annotated[str, typer.Option("--prompts", help="A JSONL prompt file, 'bench' or 'train'.")]
LimitOption = Annotated[int, typer.Option("--limit", help="Use so many prompts, spread evenly over the file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]


def inspect(
    model: ModelArgument = "smollm2-135m",
    prompts: PromptsOption = "bench",
    limit: LimitOption = 6,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Length of the answers.")] = 48,
    json_out: JsonOption = False,
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Before any training: what blocks and head cost here, how early the model knows, and what that could give."""
    from adi.measure.inspect import inspect as measure

    errors, out = Console(stderr=True), Console(highlight=False)
    items = chosen_prompts(prompts, limit)
    chosen = [item.prompt for item in items]
    loaded = Source(model, backend, precision, device).load(errors)
    with Reporter(errors) as report:
        found = measure(loaded, chosen, max_new_tokens=max_new_tokens, progress=report)
    if json_out:
        print(json.dumps({**made_of(items), **asdict(found)}))
        return
    spec, cost = found.spec, found.cost
    out.print(
        f"{spec.name}: {spec.family}, {spec.layers} blocks of width {spec.width}, vocabulary {spec.vocabulary}, context "
        f"{spec.context}; {spec.backend} engine, {spec.precision}, {spec.device}",
        markup=False,
    )
    table = Table(title="Cost on this machine, ms (median)", title_justify="left")
    for name in ("rows", "one block", "all blocks", "head", "head in blocks"):
        table.add_column(name, justify="right")
    for i, rows in enumerate(cost.rows):
        b, all_, h = cost.block_seconds[i], cost.blocks_seconds[i], cost.head_seconds[i]
        table.add_row(str(rows), f"{1e3 * b:.2f}", f"{1e3 * all_:.1f}", f"{1e3 * h:.2f}", f"{h / b:.1f}")
    out.print(table)
    table = Table(title=f"The model's own head at each depth, untrained ({found.tokens} tokens)", title_justify="left")
    table.add_column("depth", justify="right")
    table.add_column("full model's token", justify="right")
    for depth, share in found.agreement.items():
        table.add_row(str(depth), f"{share:.1%}")
    out.print(table)
    out.print(_ceilings(found))
    out.print(found.advice, markup=False)


def _ceilings(found: Headroom) -> Table:
    depths = sorted({c.depth for c in found.ceilings})
    shares = sorted({c.acceptance for c in found.ceilings})
    table = Table(title="Speed-up ceiling (best draft length) by exit depth and acceptance", title_justify="left")
    table.add_column("depth", justify="right")
    for share in shares:
        table.add_column(f"{share:.0%}", justify="right")
    best = {(c.depth, c.acceptance): c for c in found.ceilings}
    for depth in depths:
        cells = [best[depth, share] for share in shares]
        table.add_row(str(depth), *(f"{c.speedup:.2f} x ({c.draft_tokens})" for c in cells))
    return table


def chosen_prompts(source: str, limit: int) -> list[PromptItem]:
    """``limit`` prompts, evenly over the file, so that every category is there."""
    items = read_prompts(source)
    if limit < 1:
        raise AdiError(f"--limit is {limit}; it must be at least 1.")
    return spread(items, limit)


def made_of(items: list[PromptItem]) -> dict[str, Any]:
    from adi.measure.provenance import provenance

    return provenance(shlex.join(["adi", *sys.argv[1:]]), items)


@contextmanager
def progress(console: Console, what: str) -> Iterator[Any]:
    with Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
