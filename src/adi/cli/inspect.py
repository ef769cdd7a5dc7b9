"""``adi inspect``: what early exits could give, before any training."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from adi.cli.shared.options import (
    AnswerTokensOption,
    EngineOptions,
    JsonOption,
    LimitOption,
    ModelArgument,
    PromptsOption,
    chosen_prompts,
)
from adi.cli.shared.output import command_line, err, out, percent, say, table
from adi.progress import Reporter

if TYPE_CHECKING:
    from rich.table import Table

    from adi.measure.inspect import CopiesGain, Headroom


def inspect(
    model: ModelArgument = "smollm2-135m",
    prompts: PromptsOption = "bench",
    limit: LimitOption = 6,
    max_new_tokens: AnswerTokensOption = 48,
    json_out: JsonOption = False,
    *,
    engine: EngineOptions,
) -> None:
    """Before any training: what blocks and head cost here, at which depth the token is decided, and what that could give."""
    from adi.measure.inspect import inspect as measure
    from adi.measure.provenance import provenance

    items = chosen_prompts(prompts, limit)
    loaded = engine.load(model)
    with Reporter(err(), "answers") as report:
        found = measure(loaded, [item.prompt for item in items], max_new_tokens=max_new_tokens, progress=report)
    if json_out:
        print(json.dumps({**provenance(command_line(), items), **asdict(found)}))
        return
    spec, cost, console = found.spec, found.cost, out()
    say(
        console,
        f"{spec.name}: {spec.family}, {spec.layers} blocks of width {spec.width}, vocabulary {spec.vocabulary}, context "
        f"{spec.context}; {spec.backend} engine, {spec.numbers}, {spec.device}",
    )
    seconds = zip(cost.rows, cost.block_seconds, cost.blocks_seconds, cost.head_seconds, strict=True)
    rows = [(n, f"{1e3 * b:.2f}", f"{1e3 * all_:.1f}", f"{1e3 * h:.2f}", f"{h / b:.1f}") for n, b, all_, h in seconds]
    names = ("rows", "one block", "all blocks", "head", "head in blocks")
    console.print(table("Cost on this machine, ms (median)", names, rows))
    shares = [(depth, percent(share, 1)) for depth, share in found.agreement.items()]
    title = f"The model's own head at each depth, untrained ({found.tokens} tokens)"
    console.print(table(title, ("depth", "agrees with the full model's token"), shares))
    console.print(_ceilings(found))
    if (copies := found.copies) is not None:
        say(console, _copies(copies))
    say(console, found.advice)


def _copies(found: CopiesGain) -> str:
    there = f"there are copies for passes of {', '.join(map(str, found.rows))} rows" if found.rows else "there is no copy"
    gains = ", ".join(f"{gain:.2f}" for gain in found.gains)
    return (
        f"The blocks' weights take {found.copy_mb} MB, and so does each copy for a fixed number of rows. {found.memory_mb} MB "
        f"are allowed for copies (--memory), so {there}; passes of 1, 3 and 8 rows in turn are {gains} x as fast as without."
    )


def _ceilings(found: Headroom) -> Table:
    depths = sorted({c.depth for c in found.ceilings})
    shares = sorted({c.acceptance for c in found.ceilings})
    best = {(c.depth, c.acceptance): f"{c.speedup:.2f} x ({c.draft_tokens})" for c in found.ceilings}
    rows = [(depth, *(best[depth, share] for share in shares)) for depth in depths]
    title = "Speed-up ceiling (best draft length) by exit depth and acceptance"
    return table(title, ("depth", *map(percent, shares)), rows)
