"""``adi solve``: a looped model on items of its task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from adi.cli.shared.options import JsonOption, option, whole_numbers
from adi.cli.shared.output import command_line, out, percent, say, table
from adi.errors import UsageError
from adi.files import require_writable, write_text


def solve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="products, or a folder of adi train.")] = "products",
    item: Annotated[
        str | None, typer.Argument(metavar="ITEM", help="A puzzle, or ids with commas; by default one is drawn.")
    ] = None,
    count: Annotated[int | None, option("--count", min=1, help="Judge on so many test items instead.")] = None,
    seed: Annotated[int, option("--seed", min=0, help="Of the items that are drawn.")] = 0,
    threshold: Annotated[
        float | None,
        option("--threshold", min=0, max=1, help="The gate's chance from which on it halts; by default the model's."),
    ] = None,
    price: Annotated[float | None, option("--price", help="Nats for a full pass, for a gate that takes it.", rare=True)] = None,
    verified: Annotated[bool, option("--verified", help="An answer stands only once the turn after has repeated it.")] = False,
    starts: Annotated[
        int, option("--starts", min=1, help="With --count: run a puzzle from so many starts; the first to halt wins.")
    ] = 1,
    time: Annotated[
        str | None, option("--time", metavar="SIZES", help="Time halting against all turns at these batch sizes, such as 1,32.")
    ] = None,
    certify: Annotated[
        float | None, option("--certify", help="Bound how often halted answers differ from all turns, such as 0.02, at 95%.")
    ] = None,
    json_out: JsonOption = False,
    page: Annotated[Path | None, option("--page", metavar="FILE", help="Write the turns as an HTML page too.")] = None,
) -> None:
    """Show an item being solved turn by turn, or judge a model on many: does depth follow difficulty?"""
    require_writable(page)
    if count is not None or json_out or time is not None or certify is not None:
        if item is not None or page is not None:
            raise UsageError(f"--count, --time, --certify and --json judge drawn items: leave {item or page} out.")
        sizes = () if time is None else whole_numbers("--time", time)
        halting = {"price": price, "threshold": threshold, "verified": verified, "starts": starts}
        _judge(_judged(model, count or 256, seed, halting, sizes, certify), json_out)
        return
    from adi.measure.turns import turns_of, turns_page

    if starts > 1:
        raise UsageError(f"--starts {starts} races many items, and one is shown turn by turn from one start; give --count.")
    shown = turns_of(model, item, seed, price=price, threshold=threshold, verified=verified)
    console = out()
    for line in shown.lines():
        console.print(line, soft_wrap=True)
    if page is not None:
        write_text(page, turns_page(shown))


def _judged(
    model: str,
    count: int,
    seed: int,
    halting: dict[str, Any],
    sizes: Sequence[int],
    level: float | None,
) -> dict[str, Any]:
    from adi.measure.solving import certified, solving_report, speed

    found: dict[str, Any] = {} if level is None else {"certified": certified(model, level, count, seed, **halting)}
    found |= {"command": command_line(), **solving_report(model, count, seed, **halting)}
    return found | ({"speed": speed(model, sizes, seed, **halting)} if sizes else {})


def _judge(found: dict[str, Any], as_json: bool) -> None:
    console = out()
    if as_json:
        typer.echo(json.dumps(found))
        return
    say(console, f"{found['task']}: {found['items']} test items, seed {found['seed']}")
    say(
        console,
        f"accuracy with all {found['turns']} turns {percent(found['accuracy_all_turns'], 2)}; halted by the gate "
        f"{percent(found['accuracy_halted'], 2)} in {found['mean_turns']:.2f} turns on average",
    )
    say(console, f"rank correlation of turns with difficulty {found['rank_correlation']:.3f}")
    if "certified" in found:
        say(console, _certificate(found["certified"]))
    for row in found.get("speed", ()):
        say(console, f"batch of {row['batch']}: {row['median']:.2f} x all turns ({row['low']:.2f} to {row['high']:.2f})")
    rows = [(f"{r['from']} to {r['to']}", f"{r['turns']:.2f}", percent(r["accuracy"], 1)) for r in found["by_difficulty"]]
    console.print(table(None, ("difficulty", "mean turns", "right"), rows))


def _certificate(found: dict[str, Any] | None) -> str:
    if found is None:
        return "no threshold could be certified: give more items, or a higher level"
    return (
        f"certified: at threshold {found['threshold']} answers differ from all turns in at most {found['level']:g}, with "
        f"{percent(1 - found['delta'])} confidence ({found['observed']:.4f} seen), in {found['mean_turns']:.2f} turns"
    )
