"""``adi audit``: proof that verified decoding changes nothing here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from adi.cli.shared.options import (
    BackendOption,
    DeviceOption,
    ExitsOption,
    ModelArgument,
    exits_for,
    judged_exits,
    listed,
    option,
)
from adi.cli.shared.output import command_line, err, out, say, table
from adi.files import require_writable, write_json, write_text
from adi.progress import Reporter


def audit(
    model: ModelArgument = "smollm2-135m",
    exits: ExitsOption = None,
    limit: Annotated[int, option("--limit", min=1, help="Use so many prompts, spread evenly over the 80 'bench' prompts.")] = 4,
    max_new_tokens: Annotated[int, option("--max-new-tokens", "-n", min=1, help="Length of the texts.")] = 48,
    draws: Annotated[int, option("--draws", min=1, help="Texts sampled with each way of drafting.")] = 400,
    precision: Annotated[str, option("--precision", help="Several with commas: fp32, int8, int4, bf16.")] = "auto",
    seed: Annotated[int, option("--seed", help="Of drafts, faults and samples.", rare=True)] = 0,
    json_out: Annotated[Path | None, option("--json", metavar="FILE", help="Write the report here ('-' prints it).")] = None,
    html: Annotated[Path | None, option("--html", metavar="FILE", help="Write the report as a page here.")] = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Prove on your model and machine that verified decoding changes nothing: exit code 1 where it does."""
    from adi.measure.audit.run import audit as measure
    from adi.measure.audit.run import audit_page

    file = None if str(json_out) == "-" else json_out
    named = judged_exits(exits)
    require_writable(file, html)
    with Reporter(err()) as progress:
        report = measure(
            model,
            None if named is None else lambda loaded: exits_for(loaded, named),
            precisions=listed(precision),
            backend=backend,
            device=device,
            limit=limit,
            max_new_tokens=max_new_tokens,
            draws=draws,
            seed=seed,
            command=command_line(),
            notice=lambda line: progress(0, 0, line),
        )
    if html is not None:
        write_text(html, audit_page(report))
    if file is not None:
        write_json(file, report)
    if file is not json_out:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(out(), report)
    if not report["passed"]:
        raise typer.Exit(1)


def _show(console: Console, report: dict[str, Any]) -> None:
    for engine in report["engines"]:
        title, columns = f"{report['model']}, {engine['backend']} {engine['precision']}", ("check", "tried", "found", "")
        rows = ((check, tried, found, "ok" if well else "VIOLATION") for check, tried, found, well in _rows(engine))
        console.print(table(title, columns, rows, left=columns))
    for violation in report["violations"]:
        say(console, f"violation: {violation}", "red")
    count = len(report["violations"])
    say(console, "passed: verified is full depth" if report["passed"] else f"not passed: {count} violations", "bold")


def _rows(engine: dict[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    """Check, what was tried, what was found, whether it held."""
    drifts = [d for found in engine["replay"] for d in found["drifts"]]
    rollbacks = sum(sum(found["rollbacks"].values()) for found in engine["replay"])
    for of in dict.fromkeys(d["of"] for d in drifts):
        mine = [d for d in drifts if d["of"] == of]
        drafted, plain = (max(d[k] for d in mine) for k in ("drafted", "plain"))
        tried, found = f"{rollbacks} rollbacks, {len({d['depth'] for d in mine})} depths", f"off by {drafted:.2g}"
        yield f"replay: {of}", tried, f"{found}, plain decoding by {plain:.2g}", all(d["within"] for d in mine)
    for kind in ("greedy", "faults"):
        for t in engine[kind]:
            gaps = t["divergences"]
            margins = "".join(f", margin {d['margin']:.1e}{' (tie)' if d['explained'] else ''}" for d in gaps[:3])
            tried = f"{t['runs']} runs, {t['tokens']} tokens, {t['accepted']} of {t['drafted']} drafts accepted"
            yield f"{kind}: {t['name']}", tried, f"{len(gaps)} divergences{margins}", t["within"]
    for d in engine["sampling"]:
        tried = f"{d['draws']} draws of {d['tokens']} tokens, {d['accepted']} of {d['drafted']} drafts accepted"
        near = f", {d['near']} on an edge" if d["near"] else ""
        found = f"variation {d['variation']:.3f}, band {d['band']:.3f}; {d['foreseen']} as their seeds give{near}"
        yield f"sampling: {d['drafts']}", tried, found, d["within"]
