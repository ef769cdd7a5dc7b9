"""``adi study exposure``: does depth fall with the number of times that a fact was met?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from adi.cli.shared.options import JsonFileOption, chosen_among, numbers, option, whole_numbers
from adi.cli.shared.output import command_line, err, out, percent, say, table
from adi.files import require_writable, write_json
from adi.progress import Reporter


def exposure(
    folder: Annotated[
        Path, option("--out", "-o", metavar="DIR", file_okay=False, help="Folder for the parts; a stopped study resumes there.")
    ],
    prices: Annotated[str, option("--prices", help="Prices on depth, in nats for a full pass.")] = "0,0.03,0.1,0.3",
    seeds: Annotated[str, option("--seeds", help="Seeds of facts and weights.")] = "0,1,2",
    shapes: Annotated[str, option("--shapes", help="looped (turns share weights) or plain (a stack).")] = "looped,plain",
    steps: Annotated[int, option("--steps", min=1, help="Steps of training of each part.")] = 500,
    most_exposures: Annotated[
        int, option("--most-exposures", min=1, help="How often the most familiar facts come; a power of 2.")
    ] = 256,
    json_out: JsonFileOption = None,
) -> None:
    """Train small models on texts in which questions come a known number of times, and see how deep each is decided.

    One part is one shape, price and seed: some minutes of one core. docs/habits.md has what it found.
    """
    from adi.measure.exposure.settings import SETTINGS, SHAPES, ExposureSettings
    from adi.schema import claim, from_json

    require_writable(json_out)
    grid: dict[str, Any] = {
        "prices": numbers("--prices", prices),
        "seeds": whole_numbers("--seeds", seeds),
        "shapes": chosen_among(SHAPES, "--shapes", shapes),
        "steps": steps,
        "most_exposures": most_exposures,
    }
    settings = from_json(grid, ExposureSettings, "the settings of the study")
    claim(folder / SETTINGS, settings)
    from adi.measure.exposure.report import report
    from adi.measure.exposure.study import run_study
    from adi.measure.provenance import provenance

    with Reporter(err(), "parts", log=folder / "log.txt") as progress:
        found = report(settings, run_study(settings, folder, progress))
    if json_out is not None:
        write_json(json_out, {**provenance(command_line(), ()), **found})
    _show(found)


def _show(found: dict[str, Any]) -> None:
    """Slopes by shape and price; what remains after devaluation."""
    rows = []
    for shape in found["shapes"]:
        for price in shape["prices"]:
            slopes = price["slopes"]["worked_out"]
            ends = [row for row in price["levels"] if row["hops"] != "1"]
            first = " to ".join(percent(row["right_first"]) for row in (ends[0], ends[-1]))
            rows.append((shape["shape"], f"{price['price']:g}", *(_slope(slopes[d]) for d in ("settled", "halted")), first))
    columns = ("shape", "price", "settled: turns a doubling", "halted: turns a doubling", "first turn right, new to familiar")
    out().print(table("Depth against log2(1 + exposures), all else equal", columns, rows, left=("shape",)))
    for shape in found["shapes"]:
        for row in shape.get("minus_price_0", ()):
            say(out(), f"{shape['shape']}, price {row['price']:g} less price 0: settled {_slope(row['settled'])}")


def _slope(found: dict[str, Any] | None) -> str:
    if found is None:
        return "too few"
    return f"{found['slope']:+.4f} ({found['interval'][0]:+.4f} to {found['interval'][1]:+.4f})"
