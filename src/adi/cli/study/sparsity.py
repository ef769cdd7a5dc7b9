"""``adi study sparsity``: do the units of a sparse layer tell whether an exit is right?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from adi.cli.shared.options import JsonFileOption, chosen_among, option, whole_numbers
from adi.cli.shared.output import command_line, err, out, say, table
from adi.files import require_writable, write_json
from adi.progress import Reporter


def sparsity(
    folder: Annotated[
        Path, option("--out", "-o", metavar="DIR", file_okay=False, help="Folder for the parts; a stopped study resumes there.")
    ],
    rules: Annotated[
        str, option("--rules", help="What shapes the prototypes; frozen (random ones) and relu (a dense MLP) are controls.")
    ] = "entropy+,entropy-,utility,price,frozen,relu",
    seeds: Annotated[str, option("--seeds", help="Seeds of weights and items.")] = "0,1,2",
    steps: Annotated[int, option("--steps", min=1, help="Steps of training of each part.")] = 360,
    batch: Annotated[int, option("--batch", min=1, help="Items of a step.")] = 24,
    items: Annotated[int, option("--items", min=4, help="Test items; half of them fit, half judge.")] = 300,
    json_out: JsonFileOption = None,
) -> None:
    """Train small sparse models, and see what active share, route margin and jumps between turns add to entropy."""
    from adi.measure.provenance import provenance
    from adi.measure.trigger_study.sparsity import RULES, SparsitySettings, study_sparsity
    from adi.schema import from_json

    require_writable(json_out)
    grid: dict[str, Any] = {"rules": chosen_among(RULES, "--rules", rules), "seeds": whole_numbers("--seeds", seeds)}
    sizes = {"steps": steps, "batch": batch, "items": items}
    settings = from_json({**grid, **sizes}, SparsitySettings, "the settings of the study")
    with Reporter(err(), "Studying sparsity") as progress:
        found = study_sparsity(settings, folder, progress)
    if json_out is not None:
        write_json(json_out, {**provenance(command_line(), ()), **found})
    gains = [(rule, rule["gains"]["entropy"]) for rule in found["rules"]]
    rows = [
        (rule["rule"], f"{rule['accuracy']:.1%}", f"{rule['active']:.1%}", *(f"{gain[name]['more']:+.4f}" for name in gain))
        for rule, gain in gains
    ]
    say(out(), "AUROC of an exit's being right that each signal adds to entropy, within turns, on held-out items")
    out().print(table(None, ("rule", "right", "active", *next(iter(gains))[1]), rows, left=("rule",)))
