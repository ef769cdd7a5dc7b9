"""The page of an audit: drawn here, without a script, everything in it escaped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from adi.files import write_text
from adi.measure.trace_page import filled

Entry = Mapping[str, Any]


def write_audit(report: Entry, path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all."""
    write_text(Path(path), page(report))


def page(report: Entry) -> str:
    """The whole page as HTML text."""
    verdict = "passed" if report["passed"] else f"{len(report['violations'])} violations"
    title = f"Audit of {report['model']}: {verdict}"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(", ".join((report["processor"], report["machine"], versions)))}</p>',
        f"<p><code>{escape(report['command'])}</code></p>",
    ]
    if report["violations"]:
        parts.append(_section("Violations", "", f"<ul>{''.join(f'<li>{escape(v)}</li>' for v in report['violations'])}</ul>"))
    for engine in report["engines"]:
        parts += _engine(engine)
    return filled("bench.html", {"title": escape(title), "body": "\n".join(parts)})


def _engine(engine: Entry) -> list[str]:
    rows = {True: "rows found invariant", False: "rows found to vary", None: "rows not looked at"}[engine["row_invariant"]]
    where = f"{engine['backend']} {engine['precision']}"
    return [
        f"<h1>{escape(where)}</h1>",
        f'<p class="soft">{rows}; a logit is off by {_size(engine["noise"])} at most</p>',
        _section("Replay", "largest differences from one full pass", _replay(engine)),
        *_texts("Greedy match", engine["greedy"]),
        *_texts("Fault injection", engine["faults"]),
        _section("Sampling", "total variation from the exact law, and its band", _sampling(engine)),
    ]


def _replay(engine: Entry) -> str:
    rows = [
        (d["of"], d["depth"], i, *(_size(d[k]) for k in ("drafted", "plain", "allowed", "size")), d["within"])
        for i, found in enumerate(engine["replay"])
        for d in found["drifts"]
    ]
    return _table(("", "depth", "prompt", "drafted", "plain", "allowed", "typical value", ""), rows)


def _size(value: float | None) -> str:
    return "no number" if value is None else f"{value:.2g}"


def _texts(title: str, tallies: Sequence[Entry]) -> list[str]:
    """How many runs said what full depth says, and where the others first did not."""
    names = ("name", "runs", "tokens", "drafted", "accepted")
    rows = [(*(t[k] for k in names), len(t["divergences"]), t["within"]) for t in tallies]
    head = ("", "runs", "tokens", "drafts", "accepted", "divergences", "")
    parts = [_section(title, "against full depth, token for token", _table(head, rows))]
    where, sizes = ("prompt", "at", "full", "said"), ("margin", "gap", "noise")
    gaps = [
        (t["name"], *(d[k] for k in where), *(f"{d[k]:.2g}" for k in sizes), d["explained"])
        for t in tallies
        for d in t["divergences"]
    ]
    if gaps:
        tops = ("", "prompt", "token", "full depth's", "said", "margin", "gap", "noise", "")
        parts.append(_section("First divergences", "in logits; a tie is a gap of at most two noises", _table(tops, gaps)))
    return parts


def _sampling(engine: Entry) -> str:
    names = ("drafts", "draws", "drafted", "accepted", "outcomes")
    rows = [
        (*(d[k] for k in names), f"{d['variation']:.4f}", f"{d['band']:.4f}", d["foreseen"], d["near"], d["within"])
        for d in engine["sampling"]
    ]
    head = ("", "draws", "drafts", "accepted", "outcomes", "variation", "band", "as foreseen", "near an edge", "")
    return _table(head, rows)


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{escape(title)}<small>{escape(note)}</small></h2><div class="scroll">{body}</div></section>'


def _table(head: tuple[str, ...], rows: Iterable[Sequence[Any]]) -> str:
    """The last cell of a row is whether all is well there."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = []
    for first, *cells, well in rows:
        said = "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + (
            "<td>ok</td>" if well else '<td class="best">violation</td>'
        )
        lines.append(f'<tr><th scope="row">{escape(str(first))}</th>{said}</tr>')
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
