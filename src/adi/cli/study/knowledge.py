"""``adi study knowledge``: what does each turn of a looped model know of the state that it has to follow?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from adi.cli.shared.options import JsonFileOption, option
from adi.cli.shared.output import command_line, out, say, table
from adi.files import require_writable, write_json

WHAT = {"answer": "with the last RESET k ago (the answer)", "on_the_way": "with the last RESET further back (on the way)"}


def knowledge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="products, or a folder of adi train on products.")] = "products",
    count: Annotated[int, option("--count", min=64, help="Texts: probes are fitted on half of them.")] = 1024,
    seed: Annotated[int, option("--seed", min=0, help="Of the texts.")] = 7,
    json_out: JsonFileOption = None,
) -> None:
    """Linear probes for the product of the last k elements after each turn: serial, or doubling from turn to turn?"""
    require_writable(json_out)
    from adi.measure.exposure.knowledge import products_knowledge
    from adi.measure.provenance import provenance

    found = products_knowledge(model, count, seed)
    if json_out is not None:
        write_json(json_out, {"format": "adi-knowledge", "version": 1, **provenance(command_line(), ()), **found})
    for name, what in WHAT.items():
        _show(found[name], what)


def _show(found: dict[str, Any], what: str) -> None:
    turns, steps = (sorted({row[name] for row in found["rows"]}) for name in ("turn", "steps"))
    known = {(row["steps"], row["turn"]): row for row in found["rows"]}
    rows = []
    for k in steps:
        controls = (known[k, turns[-1]][name] for name in ("shuffled", "untrained"))
        rows.append((k, *(f"{value:.2f}" for value in (*(known[k, turn]["accuracy"] for turn in turns), *controls))))
    columns = ("k", *(f"turn {t}" for t in turns), "shuffled", "untrained")
    out().print(table(f"Product of the last k elements, {what}", columns, rows))
    if found["verdict"] is not None:
        say(out(), f"known back to {', '.join(map(str, found['reach']))} elements turn by turn: {found['verdict']}")
