"""``adi audit``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from adi.cli.options import BackendOption, DeviceOption, ExitsOption, ModelArgument, exits_for
from adi.files import require_writable, write_json

if TYPE_CHECKING:
    from adi.model.load import Model

FileOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report here ('-' prints it).")]


def audit(
    model: ModelArgument = "smollm2-135m",
    exits: ExitsOption = None,
    limit: Annotated[int, typer.Option("--limit", help="Use so many prompts, spread evenly over the built-in ones.")] = 4,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Length of the texts.")] = 48,
    draws: Annotated[int, typer.Option("--draws", help="Texts drawn by each way of drafting.")] = 400,
    precision: Annotated[str, typer.Option("--precision", help="Several with commas: fp32, int8, int4, bf16.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of drafts, faults and draws.")] = 0,
    json_out: FileOption = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report as a page here.")] = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Prove on your model and machine that verified decoding changes nothing: exit code 1 where it does."""
    from adi.measure.audit.report import write_audit
    from adi.measure.audit.run import audit as measure

    errors, printed = Console(stderr=True, highlight=False), json_out is not None and str(json_out) == "-"
    for path in (None if printed else json_out, html):
        if path is not None:
            require_writable(path)

    def chosen(loaded: Model) -> Any:
        return exits_for(loaded, exits)

    report = measure(
        model,
        None if exits is None else chosen,
        precisions=[part.strip() for part in precision.split(",") if part.strip()],
        backend=backend,
        device=device,
        limit=limit,
        max_new_tokens=max_new_tokens,
        draws=draws,
        seed=seed,
        command=shlex.join(["adi", *sys.argv[1:]]),
        notice=lambda said: errors.print(said, markup=False, soft_wrap=True),
    )
    if html is not None:
        write_audit(report, html)
    if json_out is not None and not printed:
        write_json(json_out, report)
    if printed:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(Console(highlight=False), report)
    if not report["passed"]:
        raise typer.Exit(1)


def _show(out: Console, report: dict[str, Any]) -> None:
    for engine in report["engines"]:
        table = Table(
            title=f"{report['model']}, {engine['backend']} {engine['precision']}", title_justify="left", box=SIMPLE_HEAD
        )
        for name in ("check", "tried", "found", ""):
            table.add_column(name)
        for row in _rows(engine):
            table.add_row(*row)
        out.print(table)
    for said in report["violations"]:
        out.print(f"violation: {said}", markup=False, soft_wrap=True, style="red")
    count = len(report["violations"])
    out.print("passed: verified is full depth" if report["passed"] else f"not passed: {count} violations", style="bold")


def _rows(engine: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Check, what was tried, what was found, whether it held."""
    rows = []
    drifts = [d for found in engine["replay"] for d in found["drifts"]]
    rollbacks = sum(sum(found["rollbacks"].values()) for found in engine["replay"])
    for of in dict.fromkeys(d["of"] for d in drifts):
        mine = [d for d in drifts if d["of"] == of]
        drafted, plain = (max(d[k] for d in mine) for k in ("drafted", "plain"))
        tried, found = f"{rollbacks} rollbacks, {len({d['depth'] for d in mine})} depths", f"off by {drafted:.2g}"
        rows.append((f"replay: {of}", tried, f"{found}, plain decoding by {plain:.2g}", all(d["within"] for d in mine)))
    for kind in ("greedy", "faults"):
        for t in engine[kind]:
            gaps = t["divergences"]
            margins = "".join(f", margin {d['margin']:.1e}{' (tie)' if d['explained'] else ''}" for d in gaps[:3])
            tried = f"{t['runs']} runs, {t['tokens']} tokens, {t['accepted']} of {t['drafted']} drafts accepted"
            rows.append((f"{kind}: {t['name']}", tried, f"{len(gaps)} divergences{margins}", t["within"]))
    for d in engine["sampling"]:
        tried = f"{d['draws']} draws of {d['tokens']} tokens, {d['accepted']} of {d['drafted']} drafts accepted"
        near = f", {d['near']} on an edge" if d["near"] else ""
        found = f"variation {d['variation']:.3f}, band {d['band']:.3f}; {d['foreseen']} as their seeds say{near}"
        rows.append((f"sampling: {d['drafts']}", tried, found, d["within"]))
    return [(check, tried, found, "ok" if well else "VIOLATION") for check, tried, found, well in rows]
