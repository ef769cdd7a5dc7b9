"""Plots and tables of docs/triggers.md from docs/results/triggers.json and trigger_runs.json; ``--check``: are they current?"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
WIDE, HIGH, LEFT, TOP, LEGEND = 560, 260, 60, 34, 190  # pixels: the plot, and what is around it
COLOURS = ("#4878cf", "#d65f5f", "#59a14f", "#b07aa1", "#e08a2e", "#76b7b2", "#8c8c8c", "#c4b454", "#9c755f", "#3d3d9e")
STYLE = (
    "<style>text{fill:#24292f} .q{fill:#57606a} .g{stroke:#8b949e;stroke-opacity:.35} .one{stroke:#24292f;stroke-dasharray:4 3}"
    "@media (prefers-color-scheme: dark){text{fill:#e6edf3} .q{fill:#9da7b1} .one{stroke:#e6edf3}}</style>"
)
Study = Mapping[str, Any]
Series = Mapping[str, Sequence[float]]


def svg(title: str, parts: Sequence[str], high: int = HIGH) -> str:
    width, height = LEFT + WIDE + LEGEND, TOP + high + 40
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
    head += f'font-size="13" role="img" aria-label="{escape(title)}">'
    return "\n".join([head, STYLE, f'<text x="{LEFT}" y="18">{escape(title)}</text>', *parts, "</svg>"]) + "\n"


def _frame(low: float, high: float, ticks: Sequence[float], shown: Callable[[float], str]) -> tuple[list[str], Any]:
    """Horizontal rules with their numbers, and where a value lies."""

    def place(value: float) -> float:
        return TOP + HIGH * (1 - (value - low) / (high - low))

    parts = []
    for tick in ticks:
        y = place(tick)
        parts.append(f'<line class="g" x1="{LEFT}" x2="{LEFT + WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="q" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{shown(tick)}</text>')
    return parts, place


def _legend(names: Sequence[str]) -> list[str]:
    parts = []
    for i, name in enumerate(names):
        y = TOP + 8 + 19 * i
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<rect x="{LEFT + WIDE + 16}" y="{y - 6}" width="12" height="8" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + WIDE + 34}" y="{y + 3}">{escape(name)}</text>')
    return parts


def lines(title: str, at: Sequence[str], series: Series, low: float, high: float, ticks: Sequence[float]) -> str:
    """One line per name, a point per place."""
    parts, place = _frame(low, high, ticks, lambda tick: f"{tick:g}")
    xs = [LEFT + WIDE * (i + 0.5) / len(at) for i in range(len(at))]
    for i, values in enumerate(series.values()):
        colour = COLOURS[i % len(COLOURS)]
        points = [f"{x:.1f},{place(v):.1f}" for x, v in zip(xs, values, strict=True)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(points)}"/>')
        parts += [f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" fill="{colour}"/>' for p in points]
    parts += [
        f'<text class="q" x="{x:.1f}" y="{TOP + HIGH + 20}" text-anchor="middle">{escape(n)}</text>'
        for x, n in zip(xs, at, strict=True)
    ]
    return svg(title, parts + _legend(list(series)))


def columns(title: str, at: Sequence[str], series: Series, high: float, ticks: Sequence[float], percent: bool) -> str:
    """A group of columns per place."""
    parts, place = _frame(0, high, ticks, lambda tick: f"{tick:.0%}" if percent else f"{tick:g}")
    group = WIDE / len(at)
    each = 0.8 * group / len(series)
    for k, values in enumerate(series.values()):
        for i, value in enumerate(values):
            x, y = LEFT + group * (i + 0.1) + each * k, place(value)
            box = f'x="{x:.1f}" y="{y:.1f}" width="{each - 1:.1f}" height="{TOP + HIGH - y:.1f}"'
            parts.append(f'<rect {box} fill="{COLOURS[k % len(COLOURS)]}"/>')
    for i, name in enumerate(at):
        x = LEFT + group * (i + 0.5)
        parts.append(f'<text class="q" x="{x:.1f}" y="{TOP + HIGH + 20}" text-anchor="middle">{escape(name)}</text>')
    return svg(title, parts + _legend(list(series)))


def auroc_plot(study: Study) -> str:
    depths, signals = _depths(study), list(dict.fromkeys(s["signal"] for s in study["scores"]))
    found = {(s["signal"], s["depth"]): s["auroc"] or 0.5 for s in study["scores"]}
    series = {name: [found[name, depth] for depth in depths] for name in signals}
    title = "AUROC of each signal by exit, on prompts that nothing was fitted to (0.5: a coin)"
    return lines(title, [f"depth {d}" for d in depths], series, 0.4, 1.0, (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0))


def calibration_plot(study: Study) -> str:
    rows = study["calibrations"]
    names = {"before": "as it is", "scaled": "temperature", "isotonic": "isotonic"}
    series = {said: [row[name] for row in rows] for name, said in names.items()}
    title = "Expected calibration error of top probability by exit, on prompts that nothing was fitted to"
    high = max(0.2, *(value for values in series.values() for value in values))
    return columns(title, [f"depth {row['depth']}" for row in rows], series, high, (0, 0.05, 0.1, 0.15, 0.2), False)


def oracle_plot(study: Study) -> str:
    found = study["oracle"]
    series = {
        "right from there on": list(found["settled"].values()),
        "right there first": list(found["first_right"].values()),
    }
    layers = str(study["layers"])
    at = ["full depth" if depth == layers else f"depth {depth}" for depth in found["settled"]]
    return columns("Where an oracle would stop: share of tokens", at, series, 0.4, (0, 0.1, 0.2, 0.3, 0.4), True)


def tail_plot(study: Study) -> str:
    depths = _depths(study)
    sizes = sorted({tail["tokens"] for tail in study["tails"]})
    found = {(t["depth"], t["tokens"]): t["auroc"] or 0.5 for t in study["tails"]}
    series = {f"depth {depth}": [found[depth, size] for size in sizes] for depth in depths}
    title = "AUROC of entropy with the shortlist's tail spread over so many tokens"
    return lines(title, [f"{size:,.0f}" for size in sizes], series, 0.6, 1.0, (0.6, 0.7, 0.8, 0.9, 1.0))


def speed_plot(study: Study, runs: Study) -> str:
    """Estimated ratios as bars, measured ones as points with their intervals."""
    ran = {run["name"]: run["ratios"]["full"] for run in runs["runs"] if run["name"] != "full depth"}
    bars: dict[str, float | None] = {one["rule"]: one["ratio"] for one in study["estimates"]}
    names = [*(name for name in ran if name not in bars), *bars]
    low, high, row, left = 0.6, 2.0, 24, 260
    scale = (LEFT + WIDE + 80 - left) / (high - low)
    parts = []
    for tick in (0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0):
        x, kind = left + (tick - low) * scale, "one" if tick == 1.0 else "g"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + row * len(names)}"/>')
        parts.append(f'<text class="q" x="{x:.1f}" y="{TOP + row * len(names) + 18}" text-anchor="middle">{tick:g} x</text>')
    for i, name in enumerate(names):
        y = TOP + row * (i + 0.5)
        parts.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        if (ratio := bars.get(name)) is not None:
            box = f'x="{left}" y="{y - 6:.1f}" width="{max(0.0, (ratio - low) * scale):.1f}" height="12"'
            parts.append(f'<rect {box} fill="{COLOURS[0]}" opacity="0.75"/>')
        if name in ran:
            a, b, m = (left + (min(high, max(low, ran[name][key])) - low) * scale for key in ("low", "high", "median"))
            parts.append(f'<path d="M{a:.1f} {y:.1f}H{b:.1f}" stroke="{COLOURS[1]}" stroke-width="2"/>')
            parts.append(f'<circle cx="{m:.1f}" cy="{y:.1f}" r="4.5" fill="{COLOURS[1]}"/>')
    title = "Tokens per second against full depth: worked out (bars), measured with 95% interval (points)"
    return svg(title, parts, row * len(names))


def _depths(study: Study) -> list[int]:
    return sorted({score["depth"] for score in study["scores"]})


def calibration_table(study: Study, _: Study) -> str:
    rows = [
        "| depth | temperature | as it is | temperature scaling | isotonic | state probe | joint probe |",
        "|---:|" + "---:|" * 6,
    ]
    raw = {(s["signal"], s["depth"]): s["raw_calibration_error"] for s in study["scores"]}
    for row in study["calibrations"]:
        mine = [row["before"], row["scaled"], row["isotonic"]]
        mine += [raw[name, row["depth"]] for name in ("state_probe", "joint_probe")]
        rows.append(f"| {row['depth']} | {row['temperature']:.2f} | " + " | ".join(f"{value:.3f}" for value in mine) + " |")
    return "\n".join(rows)


def auroc_table(study: Study, _: Study) -> str:
    depths, found = _depths(study), {(s["signal"], s["depth"]): s for s in study["scores"]}
    rows = [
        "| signal | " + " | ".join(f"depth {d}" for d in depths) + " | µs, of a block |",
        "|---|" + "---:|" * (len(depths) + 1),
    ]
    agreement = [found["entropy", depth]["agreement"] for depth in depths]
    rows.append("| *the exit agrees* | " + " | ".join(f"*{share:.0%}*" for share in agreement) + " | |")
    for name in dict.fromkeys(s["signal"] for s in study["scores"]):
        mine = [found[name, depth] for depth in depths]
        cost = sorted(mine, key=lambda s: s["microseconds"])[len(mine) // 2]
        cells = ["-" if s["auroc"] is None else f"{s['auroc']:.3f}" for s in mine]
        rows.append(f"| {name} | " + " | ".join(cells) + f" | {cost['microseconds']:.0f}, {cost['share_of_block']:.0%} |")
    return "\n".join(rows)


def estimates_table(study: Study, _: Study) -> str:
    rows = ["| rule | exits | chance at least | drafts | tokens a round | drafts kept | tokens/s | of full depth |"]
    rows.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for one in study["estimates"]:
        chance = "" if one["chance"] is None else f"{one['chance']:.1f}"
        kept = "" if one["accepted_share"] is None else f"{one['accepted_share']:.0%}"
        cells = (", ".join(map(str, one["stops"])), chance, one["draft_tokens"], f"{one['tokens_per_round']:.2f}", kept)
        speed = f"{one['tokens_per_second']:.1f} | {one['ratio']:.2f}"
        rows.append(f"| {one['rule']} | " + " | ".join(map(str, cells)) + f" | {speed} |")
    made = f"`{study['command']}`: {study['calibrating_tokens']:,} tokens to choose on, {study['testing_tokens']:,} to report"
    return "\n".join(rows) + f"\n\n{made}; {study['precision']}, full depth {study['full_tokens_per_second']:.1f} tokens/s."


def runs_table(_: Study, runs: Study) -> str:
    rows = ["| | tokens/s | of full depth (95%) | of the ladder (95%) | estimated | tokens a pass | drafts kept | same text |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for run in runs["runs"]:
        ratios = [
            f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in (run["ratios"][b] for b in ("full", "ladder"))
        ]
        estimated = "" if run["estimated_ratio"] is None else f"{run['estimated_ratio']:.2f}"
        kept = "" if run["accepted_share"] is None else f"{run['accepted_share']:.0%}"
        cells = (f"{run['tokens_per_second']:.1f}", *ratios, estimated, f"{run['tokens_per_round']:.2f}", kept)
        rows.append(f"| {run['name']} | " + " | ".join(cells) + f" | {'yes' if run['same_text'] else 'no'} |")
    where = f"{runs['prompts']} prompts of the benchmark, {runs['max_new_tokens']} tokens, {runs['precision']}"
    return "\n".join(rows) + f"\n\n`{runs['command']}`: {where}, in turn; {runs['processor']}, {runs['machine']}."


def made() -> dict[Path, str]:
    """Every file that this tool is responsible for, with what it should hold."""
    study, runs = (json.loads((DOCS / "results" / name).read_text()) for name in ("triggers.json", "trigger_runs.json"))
    images = DOCS / "images"
    files = {
        images / "triggers-auroc.svg": auroc_plot(study),
        images / "triggers-calibration.svg": calibration_plot(study),
        images / "triggers-oracle.svg": oracle_plot(study),
        images / "triggers-tail.svg": tail_plot(study),
        images / "triggers-speed.svg": speed_plot(study, runs),
    }
    page = (DOCS / "triggers.md").read_text()
    tables = {"auroc": auroc_table, "calibration": calibration_table, "estimates": estimates_table, "runs": runs_table}
    for name, table in tables.items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t(study, runs)}\n{m[2]}", page, count=1, flags=re.DOTALL)
        assert count == 1, f"docs/triggers.md has no table:{name}"
    return {**files, DOCS / "triggers.md": page}


if __name__ == "__main__":
    stale = [path for path, text in made().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv and stale:
        sys.exit(f"not current: {', '.join(path.name for path in stale)}; run: python tools/triggers.py")
    for path in stale:
        path.write_text(made()[path])
