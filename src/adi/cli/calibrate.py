"""``adi calibrate``: certify the thresholds of reflex mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console

from adi.cli.shared.options import (
    EngineOptions,
    ExitsOption,
    JsonFileOption,
    ModelArgument,
    RiskKindOption,
    chosen_prompts,
    exits_for,
    judged_exits,
    option,
)
from adi.cli.shared.output import command_line, err, out, say, table
from adi.errors import FileError, UsageError
from adi.files import require_writable, write_json
from adi.progress import Reporter

if TYPE_CHECKING:
    from adi.artifact import Exits
    from adi.measure.calibration.calibrate import Calibration
    from adi.model.backbone import Spec
    from adi.risk.certificate import Certificate


DELTA = 0.05


def calibrate(
    model: ModelArgument,
    out_dir: Annotated[
        Path, option("--out", "-o", metavar="DIR", file_okay=False, help="Folder for the exits with their certificates.")
    ],
    exits: ExitsOption = None,
    risk: Annotated[list[float] | None, option("--risk", help="Level to certify (0.02); may be repeated.")] = None,
    delta: Annotated[float, option("--delta", help="Chance that a level does not hold, over the draw of text.")] = DELTA,
    kind: RiskKindOption = "disagreement",
    method: Annotated[
        Literal["ltt", "crc"], option("--method", help="Learn then Test; or conformal risk control, without delta.", rare=True)
    ] = "ltt",
    prompts: Annotated[
        list[str] | None, option("--prompts", help="JSONL prompt file, a sample of those of use; may be repeated.")
    ] = None,
    limit: Annotated[int, option("--limit", min=1, help="Take at most so many prompts, evenly.")] = 1000,
    max_new_tokens: Annotated[int, option("--max-new-tokens", "-n", min=1, help="Length of answers certified.")] = 64,
    seed: Annotated[int, option("--seed", help="Of the split of the prompts.", rare=True)] = 0,
    json_out: JsonFileOption = None,
    *,
    engine: EngineOptions,
) -> None:
    """Choose thresholds for reflex mode so that its risk stays below a level, and save the certificates with the exits.

    The prompts should be drawn as those of use will be, and not be among those that the exits were trained on; without
    --prompts the 80 'bench' prompts are taken, which are few.
    """
    from adi.measure.calibration.calibrate import RiskTest
    from adi.measure.calibration.calibrate import calibrate as measure
    from adi.measure.provenance import provenance
    from adi.prompts import spread
    from adi.risk.certificate import merged

    items = [item for source in prompts or ["bench"] for item in chosen_prompts(source, None)]
    chosen, levels = [item.text_or_ids for item in spread(items, limit)], risk or [0.02]
    RiskTest(kind, method, delta).check(levels)
    if method == "crc" and delta != DELTA:
        raise UsageError(f"--delta {delta:g} means nothing with --method crc, which has no delta; leave it out.")
    named = judged_exits(exits)
    if isinstance(named, str):
        raise UsageError(
            f"--exits {exits}: bare exits have no file to keep a certificate in; give --exits DIR with trained exits, or leave "
            "it out for a looped model."
        )
    require_writable(out_dir / "exits.json", json_out)
    loaded = engine.load(model)
    found = exits_for(loaded, named)
    earlier = _earlier(out_dir, found, loaded.backbone.spec)
    with Reporter(err(), "answers") as report:
        ways: dict[str, Any] = {"delta": delta, "kind": kind, "method": method, "max_new_tokens": max_new_tokens, "seed": seed}
        result = measure(loaded, found, chosen, levels, progress=report, **ways)
    replace(found, certificates=merged(earlier, result.certificates)).save(out_dir)
    if json_out is not None:
        about = provenance(command_line(), items)
        write_json(json_out, {"format": "adi-calibration", "version": 1, **about, **result.to_json()})
    _show(out(), result, loaded.backbone.spec.layers)
    rule = f"--risk {levels[0]:g}" + (f" --kind {kind}" if kind != "disagreement" else "")
    say(err(), f"Saved to {out_dir}. Use it: adi run --model {model} --exits {out_dir} --mode reflex {rule}")


def _earlier(out: Path, exits: Exits, spec: Spec) -> tuple[Certificate, ...]:
    """Certificates that stay beside the new ones: those that the folder has for these exits, or else the exits bring along.
    FileError where the folder's are for another precision, which would be lost."""
    from adi.artifact import load_exits

    there = load_exits(out) if (out / "exits.json").exists() else None
    if there is None or (there.base, there.depths, there.made_by) != (exits.base, exits.depths, exits.made_by):
        return tuple(c for c in exits.certificates if (c.fingerprint, c.precision) == (spec.fingerprint, spec.numbers))
    if others := {c.precision for c in there.certificates} - {spec.numbers}:
        raise FileError(
            f"{out} holds certificates for {', '.join(sorted(others))}, and exits keep those of one precision: give these, for "
            f"{spec.numbers}, a folder of their own: --out OTHER."
        )
    return there.certificates


def _show(console: Console, result: Calibration, layers: int) -> None:
    rows = []
    for c in result.certificates:
        level, observed = ((f"{x:.2%}" if c.nats is None else f"{x:.4f} nats") for x in (c.level, c.observed))
        depths = ", ".join(str(d) for d in sorted(c.trigger.depths)) or "none"
        sure = "on average" if c.delta is None else f"{1 - c.delta:.0%}"
        rows.append((c.kind, level, observed, f"{c.mean_depth:.2f}", depths, c.sequences, sure))
    names = ("risk", "level", "observed", f"mean depth of {layers}", "exits", "prompts", "confidence")
    console.print(table("Certified, on text generated in reflex mode", names, rows, left=("risk",)))
    for note in result.notes:
        say(console, note)
