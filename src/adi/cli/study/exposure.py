"""``adi study exposure``: does depth fall with the number of times that a fact was met?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from adi.cli.shared.options import chosen_among, numbers, option, whole_numbers
from adi.cli.shared.output import err
from adi.progress import Reporter


def exposure(
    folder: Annotated[
        Path, option("--out", "-o", metavar="DIR", file_okay=False, help="Folder for the parts; a stopped study resumes there.")
    ],
    prices: Annotated[str, option("--prices", help="Prices on depth, in nats for a full pass.")] = "0,0.03,0.1,0.3",
    seeds: Annotated[str, option("--seeds", help="Seeds of facts and weights.")] = "0,1,2",
    shapes: Annotated[str, option("--shapes", help="looped (turns share weights) or plain (a stack).")] = "looped,plain",
    steps: Annotated[int, option("--steps", min=1, help="Steps of training of each part.")] = 500,
    most_exposures: Annotated[int, option("--most-exposures", min=1, help="How often the most familiar facts come.")] = 256,
) -> None:
    """Train small models on stories whose facts come a known number of times, and see how deep each fact is decided."""
    from adi.measure.exposure.settings import SHAPES, ExposureSettings
    from adi.schema import from_json

    grid: dict[str, Any] = {
        "prices": numbers("--prices", prices),
        "seeds": whole_numbers("--seeds", seeds),
        "shapes": chosen_among(SHAPES, "--shapes", shapes),
    }
    settings = from_json(
        {**grid, "steps": steps, "most_exposures": most_exposures}, ExposureSettings, "the settings of the study"
    )
    settings.claim(folder)
    from adi.measure.exposure.study import run_study

    with Reporter(err(), "parts", log=folder / "log.txt") as progress:
        run_study(settings, folder, progress)
