"""The page of ``adi plot`` for a benchmark's result: speeds with intervals, ratios against full depth, categories.

Drawn here and not in the browser, so the page holds no script. Names and errors are untrusted and always escaped.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from adi.errors import AdiError
from adi.files import read_json, write_text
from adi.measure.bench.run import FORMAT, VERSION
from adi.measure.trace_page import filled

Entry = Mapping[str, Any]
LEFT, WIDE, RIGHT, ROW, HEAD = 210, 560, 150, 22, 20  # pixels: names, plot, figures; a row; the scale
TICKS = 6
PEEK = 256  # bytes in which a result says what it is


def is_result(path: str | os.PathLike[str]) -> bool:
    """Whether a file says of itself, where such files say it, that it is a benchmark."""
    try:
        with Path(path).open("rb") as file:
            return re.search(rb'"format":\s*"adi-bench"', file.read(PEEK)) is not None
    except OSError:
        return False  # whoever reads it says why


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the result of ``adi bench --json``; ValueError for a file that is none, or damaged."""
    value = read_json(Path(path), "benchmark")
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
        raise AdiError(f"{path} is not a benchmark of version {VERSION} (adi bench --json FILE makes one).")
    try:
        page(value)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise AdiError(f"the benchmark {path} is damaged: {type(error).__name__}: {error}.") from None
    return value


def write_standings(result: Entry, path: str | os.PathLike[str], base: str | None = None) -> None:
    """Write the page, whole or not at all."""
    write_text(Path(path), page(result, base))


def page(result: Entry, base: str | None = None) -> str:
    """The whole page. Ratios are against ``base``, one of adi's modes; by default against full depth as each was compared."""
    ran = sorted((r for r in result["runs"] if r["error"] is None), key=lambda r: -r["tokens_per_second"])
    names = [r["name"] for r in ran]
    if base is not None and (base not in names or not base.startswith("adi:")):
        own = ", ".join(name for name in names if name.startswith("adi:"))
        raise AdiError(f"--base {base!r} is none of adi's modes in this result; choose among {own}.")
    title = f"{result['model']}: {result['prompts']} prompts, at most {result['max_new_tokens']} new tokens"
    against = base or "full depth, same precision where it ran"
    paired, alike = "median of paired ratios; 95% interval; right is faster", "match: prompts whose tokens are full depth's"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_where(result))}</p><p><code>{escape(result["command"])}</code></p>',
        _section("Tokens per second", "median over prompts, prompt included; 95% interval", _bars(ran)),
        _section(f"Speed against {against}", paired, _forest(ran, result, base)),
        _section("Figures", f"{alike}; start: share before the first difference", _table(ran)),
        _section("Tokens per second by category", "the fastest of each in bold", _categories(ran)),
    ]
    failed = [f"<li>{escape(r['name'])}: {escape(str(r['error']))}</li>" for r in result["runs"] if r["error"] is not None]
    if failed:
        parts.append(_section("Did not run", "", f"<ul>{''.join(failed)}</ul>"))
    return filled("bench.html", {"title": escape(title), "body": "\n".join(parts)})


def against_full(run: Entry, ratios: Sequence[Entry], base: str | None = None) -> tuple[str, float, float, float] | None:
    """The base, and how many times faster than it a run is: median, low, high. None where the pair was not measured.

    The file holds adi's mode over the other one; where the base is that mode, it is turned round.
    """
    other = base or run["match_with"]
    if other == run["name"]:
        return other, 1.0, 1.0, 1.0
    pairs = {(ratio["a"], ratio["b"]): ratio for ratio in ratios}
    if (direct := pairs.get((run["name"], other))) is not None:
        return other, direct["median"], direct["low"], direct["high"]
    if (turned := pairs.get((other, run["name"]))) is not None:
        return other, 1 / turned["median"], 1 / turned["high"], 1 / turned["low"]
    return None


def _where(result: Entry) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    length = f", prompts of {result['prompt_tokens']} tokens" if result.get("prompt_tokens") else ""
    return f"{result.get('processor', '')}, {result['machine']}, {result['threads']} threads{length}; {versions}"


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{escape(title)}<small>{escape(note)}</small></h2><div class="scroll">{body}</div></section>'


def _kind(run: Entry) -> str:
    return "own" if run["name"].startswith("adi:") else "other"


def _bars(ran: Sequence[Entry]) -> str:
    most = max((r["tokens_per_second_high"] for r in ran), default=1.0)
    step = _step(most / TICKS)
    scale = WIDE / most
    parts = [_tick(LEFT + i * step * scale, f"{i * step:g}", len(ran)) for i in range(int(most / step) + 1)]
    for i, run in enumerate(ran):
        y, low, high = _middle(i), run["tokens_per_second_low"] * scale, run["tokens_per_second_high"] * scale
        length = run["tokens_per_second"] * scale
        parts.append(_name(run, y))
        parts.append(f'<rect class="{_kind(run)}" x="{LEFT}" y="{y - 7}" width="{length:.1f}" height="14"/>')
        whisker = f"M{LEFT + low:.1f} {y}H{LEFT + high:.1f}M{LEFT + low:.1f} {y - 4}v8M{LEFT + high:.1f} {y - 4}v8"
        parts.append(f'<path class="whisker" d="{whisker}"/>')
        parts.append(f'<text x="{LEFT + WIDE + 12}" y="{y + 4}">{run["tokens_per_second"]:.1f}</text>')
    return _svg(parts, len(ran))


def _forest(ran: Sequence[Entry], result: Entry, base: str | None) -> str:
    found = [(run, pair) for run in ran if (pair := against_full(run, result["ratios"], base)) is not None]
    low = min([0.5, *(pair[2] for _, pair in found)])
    high = max([2.0, *(pair[3] for _, pair in found)])
    span = math.log2(high / low)

    def place(ratio: float) -> float:
        return LEFT + WIDE * math.log2(ratio / low) / span

    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    parts = [_tick(place(2.0**n), f"{2.0**n:g} x", len(found), "one" if n == 0 else "rule") for n in powers]
    for i, (run, (other, middle, least, most)) in enumerate(found):
        y = _middle(i)
        parts.append(_name(run, y))
        parts.append(f'<path class="reach {_kind(run)}" d="M{place(least):.1f} {y}H{place(most):.1f}"/>')
        parts.append(f'<circle class="{_kind(run)}" cx="{place(middle):.1f}" cy="{y}" r="4.5"/>')
        said = "its own base" if other == run["name"] else f"{middle:.2f} ({least:.2f} to {most:.2f})"
        parts.append(f'<text x="{LEFT + WIDE + 12}" y="{y + 4}">{said}<title>against {escape(other)}</title></text>')
    return _svg(parts, len(found))


def _table(ran: Sequence[Entry]) -> str:
    head = ("", "tokens/s", "first token, ms", "tokens a round", "drafts kept", "match", "start", "peak MiB", "")
    rows = []
    for run in ran:
        cells = (
            f"{run['tokens_per_second']:.1f}",
            f"{1e3 * run['ttft_seconds']:.0f}",
            "" if run["tokens_per_round"] is None else f"{run['tokens_per_round']:.2f}",
            _percent(run["accepted_share"]),
            _percent(run["match"]),
            _percent(run["match_tokens"]),
            f"{run['peak_bytes'] / 2**20:.0f}",
        )
        about = f'<td class="text">{escape(str(run.get("about", "")))}</td>'
        rows.append(_header(run) + "".join(f"<td>{cell}</td>" for cell in cells) + about)
    return _html_table(head, rows)


def _categories(ran: Sequence[Entry]) -> str:
    names = sorted({name for run in ran for name in run["per_category"]})
    speeds = {(r["name"], c): r["per_category"][c]["tokens_per_second"] for r in ran for c in names if c in r["per_category"]}
    best = {c: max(speed for (_, name), speed in speeds.items() if name == c) for c in names}
    rows = []
    for run in ran:
        cells = []
        for name in names:
            speed = speeds.get((run["name"], name))
            mark = ' class="best"' if speed == best[name] else ""
            cells.append(f"<td{mark}>{'' if speed is None else f'{speed:.1f}'}</td>")
        rows.append(_header(run) + "".join(cells))
    return _html_table(["", *names], rows)


def _html_table(head: Sequence[str], rows: Sequence[str]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


def _header(run: Entry) -> str:
    return f'<th scope="row" class="{_kind(run)}">{escape(run["name"])}</th>'


def _svg(parts: Sequence[str], rows: int) -> str:
    width, height = LEFT + WIDE + RIGHT, HEAD + rows * ROW + 4
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _tick(x: float, said: str, rows: int, kind: str = "rule") -> str:
    line = f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD - 4}" y2="{HEAD + rows * ROW}"/>'
    return f'{line}<text class="soft" x="{x:.1f}" y="{HEAD - 8}" text-anchor="middle">{said}</text>'


def _name(run: Entry, y: float) -> str:
    return f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(run["name"])}</text>'


def _middle(row: int) -> float:
    return HEAD + row * ROW + ROW / 2


def _step(rough: float) -> float:
    """The first of 1, 2, 5 times a power of ten that is not smaller."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((m * power for m in (1, 2, 5) if m * power >= rough), 10 * power)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
