"""``adi solve``: a looped model on items of its task."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from adi.arguments import whole
from adi.cli.shared.options import JsonOption, listed, numbers, option, whole_numbers
from adi.cli.shared.output import command_line, out, percent, say, table
from adi.errors import UsageError
from adi.files import require_writable, write_text

_judging = partial(option, panel="Judging many test items")


@dataclass(frozen=True)
class JudgingOptions:
    """What is measured on many test items."""

    count: Annotated[int | None, _judging("--count", min=1, help="Judge on so many test items instead.")] = None
    starts: Annotated[int, _judging("--starts", min=1, help="Run a puzzle from so many starts; the first to halt wins.")] = 1
    time: Annotated[
        str | None, _judging("--time", metavar="SIZES", help="Time halting against all turns at these batch sizes: 1,32.")
    ] = None
    backend: Annotated[str, _judging("--backend", help="hf (torch) or openvino (compiled graphs).")] = "hf"
    certify: Annotated[
        float | None, _judging("--certify", help="Bound how often halted answers differ from all turns, such as 0.02, at 95%.")
    ] = None
    prices: Annotated[
        str | None, _judging("--prices", metavar="PRICES", help="Turns and accuracy at each of these prices: 0.01,0.1.")
    ] = None
    against: Annotated[
        str | None, _judging("--against", metavar="DIRS", help="Compare with the looped models of these folders, with commas.")
    ] = None

    @property
    def asked(self) -> list[str]:
        """The options that were given."""
        return [f"--{f.name}" for f in fields(self) if getattr(self, f.name) != f.default]

    def judged(self, model: str, seed: int, halting: dict[str, Any]) -> dict[str, Any]:
        """What ``--json`` prints."""
        from adi.measure.comparing import at_prices, compared
        from adi.measure.solving import certified, solving_report, speed

        count, found = self.count or 256, dict[str, Any]()
        sizes = () if self.time is None else [whole("--time", size, 1) for size in whole_numbers("--time", self.time)]
        prices = () if self.prices is None else numbers("--prices", self.prices)
        if prices and halting["price"] is None:
            halting = {**halting, "price": prices[0]}
        if self.certify is not None:
            found["certified"] = certified(model, self.certify, count, seed, **halting)
        found |= {"command": command_line(), **solving_report(model, count, seed, **halting)}
        if prices:
            found["prices"] = at_prices(model, prices, count, seed, **halting)
        if self.against is not None:
            found["compared"] = compared([model, *listed(self.against)], count, seed, halting["price"])
        if found.get("certified") is not None:
            halting = {**halting, "threshold": found["certified"]["threshold"]}
        return found | ({"speed": speed(model, sizes, seed, **halting)} if sizes else {})


def solve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="products, pointers, sudoku6, or a folder of adi train.")
    ] = "products",
    item: Annotated[
        str | None, typer.Argument(metavar="ITEM", help="A puzzle, a story, or ids with commas; by default one is drawn.")
    ] = None,
    seed: Annotated[int, option("--seed", min=0, help="Of the items that are drawn.")] = 0,
    threshold: Annotated[
        float | None,
        option("--threshold", min=0, max=1, help="The gate's chance from which on it halts; by default the model's."),
    ] = None,
    price: Annotated[float | None, option("--price", help="Nats for a full pass, for a gate that takes it.", rare=True)] = None,
    verified: Annotated[bool, option("--verified", help="An answer stands only once the turn after has repeated it.")] = False,
    json_out: JsonOption = False,
    page: Annotated[Path | None, option("--page", metavar="FILE", help="Write the turns as an HTML page too.")] = None,
    *,
    judging: JudgingOptions,
) -> None:
    """Show an item being solved turn by turn, or judge a model on many: does depth follow difficulty?"""
    require_writable(page)
    halting = {"price": price, "threshold": threshold, "verified": verified}
    if judging.asked or json_out:
        if item is not None or page is not None:
            what = ", ".join(judging.asked or ["--json"])
            raise UsageError(f"{what} is of many drawn items: leave {item or page} out.")
        _judge(judging.judged(model, seed, {**halting, "starts": judging.starts, "backend": judging.backend}), json_out)
        return
    from adi.measure.turns import turns_of, turns_page

    shown = turns_of(model, item, seed, **halting)
    console = out()
    for line in shown.lines():
        console.print(line, soft_wrap=True)
    if page is not None:
        write_text(page, turns_page(shown))


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
        ratio = f"{row['median']:.2f} x all turns ({row['low']:.2f} to {row['high']:.2f})"
        say(
            console,
            f"batch of {row['batch']} on {row['backend']}: {ratio}, {row['halted_ms']:.2f} ms for {row['all_turns_ms']:.2f}",
        )
    rows = [(f"{r['from']} to {r['to']}", f"{r['turns']:.2f}", percent(r["accuracy"], 1)) for r in found["by_difficulty"]]
    console.print(table(None, ("difficulty", "mean turns", "right"), rows))
    if "prices" in found:
        rows = [(f"{r['price']:g}", f"{r['mean_turns']:.2f}", percent(r["accuracy"], 2)) for r in found["prices"]]
        console.print(table(None, ("price", "mean turns", "right"), rows))
    if "compared" in found:
        console.print(_comparison(found["compared"]))


def _comparison(compared: list[dict[str, Any]]) -> Table:
    rows = []
    for r in compared:
        halted: tuple[str, ...] = ("",) * 4
        if "area" in r:
            (low, high), (behind, ahead) = r["area_interval"], r["ahead_interval"]
            shown = f"{r['area']:.4f} ({low:.4f} to {high:.4f})", f"{behind:+.4f} to {ahead:+.4f}"
            halted = (percent(r["accuracy_halted"], 2), f"{r['mean_turns']:.2f}", *shown)
        rows.append((r["model"], r["objective"] or "", r["turns"], percent(r["accuracy"], 2), *halted))
    columns = ("model", "objective", "turns", "right with all", "right halted", "mean turns", "area", "first ahead by")
    return table("On the same items", columns, rows, left=("model", "objective"), wrap=False)


def _certificate(found: dict[str, Any] | None) -> str:
    if found is None:
        return "no threshold could be certified: give more items, or a higher level"
    return (
        f"certified: at threshold {found['threshold']} answers differ from all turns in at most {found['level']:g}, with "
        f"{percent(1 - found['delta'])} confidence ({found['observed']:.4f} seen), in {found['mean_turns']:.2f} turns"
    )
