"""``adi calibrate``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from adi.cli.options import (
    BackendOption,
    DeviceOption,
    ExitsOption,
    ModelArgument,
    PrecisionOption,
    RiskKindOption,
    Source,
    exits_for,
    require_folder,
)
from adi.errors import AdiError
from adi.files import require_writable, write_json
from adi.progress import Reporter
from adi.prompts import read_prompts, spread

if TYPE_CHECKING:
    from adi.artifact import Exits
    from adi.measure.calibration.calibrate import Calibration
    from adi.model.backbone import Spec
    from adi.risk.certificate import Certificate


def calibrate(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the exits with their certificates.")],
    exits: ExitsOption = None,
    risk: Annotated[
        list[float] | None, typer.Option("--risk", help="Level to certify (0.02); may be repeated. By default 0.02.")
    ] = None,
    delta: Annotated[float, typer.Option("--delta", help="Chance that a level does not hold, over the draw of text.")] = 0.05,
    kind: RiskKindOption = "disagreement",
    method: Annotated[str, typer.Option("--method", help="ltt (Learn then Test), or crc (conformal, no delta).")] = "ltt",
    prompts: Annotated[
        list[str] | None, typer.Option("--prompts", help="JSONL prompt file, a sample of those of use; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Take at most so many prompts, evenly.")] = 1000,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Length of answers certified.")] = 64,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here.")] = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Choose thresholds for reflex mode so that its risk stays below a level, and save the certificates with the exits.

    The prompts should be drawn as those of use will be, and not be among those that the exits were trained on; without
    --prompts the built-in bench prompts are taken, which are few.
    """
    from adi.measure.calibration.calibrate import calibrate as measure
    from adi.risk.certificate import merged

    console = Console(stderr=True)
    require_folder(out)
    if limit < 1:
        raise AdiError(f"--limit is {limit}; it must be at least 1.")
    items = [item for source in prompts or ["bench"] for item in read_prompts(source)]
    chosen = [item.prompt for item in spread(items, limit)]
    loaded = Source(model, backend, precision, device).load(console)
    found = exits_for(loaded, exits)
    if found.heads is None:
        raise AdiError("bare exits have no file to keep a certificate in; give --exits DIR with trained exits.")
    require_writable(out / "exits.json")
    earlier = _earlier(out, found, loaded.backbone.spec)
    levels = risk or [0.02]
    with Reporter(console) as report:
        ways: dict[str, Any] = {"delta": delta, "kind": kind, "method": method, "max_new_tokens": max_new_tokens, "seed": seed}
        result = measure(loaded, found, chosen, levels, progress=report, **ways)
    replace(found, certificates=merged(earlier, result.certificates)).save(out)
    if json_out is not None:
        from adi.measure.provenance import provenance

        about = provenance(shlex.join(["adi", *sys.argv[1:]]), items)
        write_json(json_out, {"format": "adi-calibration", "version": 1, **about, **result.to_json()})
    _tell(Console(highlight=False), result, loaded.backbone.spec.layers)
    use = f"Saved to {out}. Use it: adi run --model {model} --exits {out} --mode reflex --risk {levels[0]:g}"
    console.print(use, highlight=False, markup=False, soft_wrap=True)


def _earlier(out: Path, exits: Exits, spec: Spec) -> tuple[Certificate, ...]:
    """Certificates that stay beside the new ones: those that the folder has for these exits, or else the exits bring along.
    ValueError where the folder's are for another precision, which would be lost."""
    from adi.artifact import load_exits

    there = load_exits(out) if (out / "exits.json").exists() else None
    if there is None or (there.base, there.depths, there.made_by) != (exits.base, exits.depths, exits.made_by):
        return tuple(c for c in exits.certificates if (c.fingerprint, c.precision) == (spec.fingerprint, spec.precision))
    if others := {c.precision for c in there.certificates} - {spec.precision}:
        raise AdiError(
            f"{out} holds certificates for {', '.join(sorted(others))}, and exits keep those of one precision: give these, for "
            f"{spec.precision}, a folder of their own: --out OTHER."
        )
    return there.certificates


def _tell(out: Console, result: Calibration, layers: int) -> None:
    table = Table(title="Certified, on the reflex's own text", title_justify="left", box=SIMPLE_HEAD)
    for name in ("risk", "level", "observed", f"mean depth of {layers}", "looks at", "prompts", "confidence"):
        table.add_column(name, justify="left" if name == "risk" else "right")
    for c in result.certificates:
        level, observed = ((f"{x:.2%}" if c.nats is None else f"{x:.4f} nats") for x in (c.level, c.observed))
        depths = ", ".join(str(d) for d in sorted(c.trigger.depths)) or "nothing"
        sure = "on average" if c.delta is None else f"{1 - c.delta:.0%}"
        table.add_row(c.kind, level, observed, f"{c.mean_depth:.2f}", depths, str(c.sequences), sure)
    out.print(table)
    for note in result.notes:
        out.print(note, soft_wrap=True, markup=False)
