"""Fill the tables of docs/reflex.md and draw its plot from docs/results/reflex.json and propagation.json; ``--check`` only says
if they are."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from math import log10
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, PLOT = DOCS / "reflex.md", DOCS / "images" / "reflex.svg"
RESULT, PROPAGATION = DOCS / "results" / "reflex.json", DOCS / "results" / "propagation.json"
NAMES = {"betting": "Learn then Test, betting", "hoeffding-bentkus": "Learn then Test, Hoeffding-Bentkus", "": "conformal"}
COLOURS = {
    "certified rules, own text": "#0b6e4f",
    "the same, replayed": "#7fb89f",
    "shipped entropy rule": "#b5542b",
    "one top probability": "#8a6fb3",
    "fixed depth": "#777777",
    "oracle": "#111111",
}
UNKNOWN = "not measured yet"
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 62, 18, 200, 50
LOWEST, HIGHEST, SHALLOWEST, DEEPEST = 1e-3, 1.0, 8.0, 35.0


def share(value: float) -> str:
    return f"{value:.2%}" if value < 0.1 else f"{value:.1%}"


def rule_of(found: dict[str, Any], trigger: dict[str, Any]) -> dict[str, Any] | None:
    return next((rule for rule in found["rules"] if rule["trigger"] == trigger), None)


def at_of(trigger: dict[str, Any]) -> str:
    if trigger["kind"] == "never":
        return "never fires"
    return ", ".join(f"{depth}: {at:.3f}" for depth, at in trigger["at"].items())


def levels_table(found: dict[str, Any]) -> str:
    """What each certified level gives, beside full depth."""
    speeds = {row["name"]: row for row in found.get("speed", [])}
    passed = {f"{row['level']:g}": row["passed"] for row in found["tasks"]["levels"]} if "tasks" in found else {}
    able = found["tasks"]["full"] if "tasks" in found else UNKNOWN
    rows = [
        "| level | believes (depth: top probability) | risk, own text | replayed | mean depth of 30 | with looks | tokens/s | "
        "against full depth | perplexity (full depth, same prompts) | tasks |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]

    def speed(name: str) -> str:
        if name not in speeds:
            return f"{UNKNOWN} | {UNKNOWN}"
        row = speeds[name]
        return f"{row['tokens_per_second']:.1f} | {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"

    rows.append(
        f"| full depth | | 0 | 0 | 30.00 | 30.00 | {speed('full')} | {found['full_perplexity']:.3f} | {able} of {able} |"
    )
    rows.append(f"| verified | | 0 | 0 | | | {speed('verified')} | as full depth | as full depth |")
    for c in found["certificates"]:
        if c["kind"] != "disagreement":
            continue
        rule = rule_of(found, c["trigger"])
        name = f"{c['level']:g}"
        own, again = (rule["own"], rule["replayed"]) if rule else (None, None)
        risks = f"{share(own['disagreement'])} | {share(again['disagreement'])}" if own and again else "0 | 0"
        depth, perplexity = (own["depth"], own["perplexity"]) if own else (30.0, found["full_perplexity"])
        cost = own["cost"] if own else 30.0
        beside = rule["full_perplexity"] if rule else perplexity
        tail = f"{perplexity:.3f} ({beside:.3f}) | {passed.get(name, UNKNOWN)} of {able}"
        rows.append(
            f"| {c['level']:.1%} | {at_of(c['trigger'])} | {risks} | {depth:.2f} | {cost:.2f} | {speed(name)} | {tail} |"
        )
    return "\n".join(rows)


def nats_table(found: dict[str, Any]) -> str:
    """The same for the loss in log-probability."""
    rows = [
        "| level, nats per token | believes (depth: top probability) | loss, own text | loss, replayed | mean depth of 30 |"
    ]
    rows.append("|---|---|---:|---:|---:|")
    for c in found["certificates"]:
        if c["kind"] != "log_loss":
            continue
        rule = rule_of(found, c["trigger"])
        cells = (
            f"{rule['own']['nats']:.4f} | {rule['replayed']['nats']:.4f} | {rule['own']['depth']:.2f}"
            if rule
            else "0 | 0 | 30.00"
        )
        rows.append(f"| {c['level']:g} | {at_of(c['trigger'])} | {cells} |")
    return "\n".join(rows)


def splits_table(found: dict[str, Any], kind: str) -> str:
    """How often the other half's risk was above the level."""
    first = found["splits"][0]
    rows = [
        f"| level | method | above the level, of {first['splits']} splits | 95% interval | by all sequences' risk | "
        "mean test risk | mean depth | fires in |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["splits"]:
        if row["kind"] != kind:
            continue
        level = f"{row['level']:.1%}" if kind == "disagreement" else f"{row['level']:g}"
        risk = share(row["mean_test_risk"]) if kind == "disagreement" else f"{row['mean_test_risk']:.4f}"
        low, high = row["interval"]
        cells = f"{row['above']} | {low:.1%} to {high:.1%} | {row['above_all']} | {risk} | {row['mean_depth']:.2f}"
        rows.append(f"| {level} | {NAMES[row['bound']]} | {cells} | {row['splits'] - row['never']} |")
    return "\n".join(rows)


def rules_table(found: dict[str, Any]) -> str:
    """The path: all rules in their order, on their own text and replayed."""
    rows = [
        "| rule | depth: top probability | prompts | risk, own text | replayed | nats | mean depth | full depth | perplexity |"
    ]
    rows.append("|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for place, rule in enumerate(found["rules"], 1):
        own, again = rule["own"], rule["replayed"]
        cells = f"{share(own['disagreement'])} | {share(again['disagreement'])} | {own['nats']:.4f} | {own['depth']:.2f}"
        cells += f" | {own['full_share']:.0%} | {own['perplexity']:.3f}"
        rows.append(f"| {place} | {at_of(rule['trigger'])} | {rule['sequences']} | {cells} |")
    return "\n".join(rows)


def drift_table(found: dict[str, Any]) -> str:
    """What spot checks find on each kind of text."""
    rows = [
        "| level | checked | text | risk | mean depth | tokens until verified | checks | running risk found | certificate |"
    ]
    rows.append("|---:|---:|---|---:|---:|---:|---:|---:|---|")
    for row in found.get("drift", []):
        until = f"{row['fell']:,}" if row["fell"] is not None else f"not in {row['tokens']:,}"
        verdict = "refuted" if row["fell"] is not None else "not refuted"
        bounds = f"{share(row['lower'])} to {share(row['upper'])}"
        what = f"{row['level']:.0%} | {row['spot_check']:.0%} | {row['text']} | {share(row['risk'])} | {row['mean_depth']:.1f}"
        rows.append(f"| {what} | {until} | {row['checked']} | {bounds} | {verdict} |")
    return "\n".join(rows)


def propagate_table() -> str:
    """Exact and propagated keys and values at the same thresholds."""
    rows = ["| depth: top probability | risk, exact | propagated | nats, exact | propagated | mean depth, exact | propagated |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|")
    for row in json.loads(PROPAGATION.read_text())["rules"]:
        a, b = row["exact"], row["propagate"]
        risks = f"{share(a['disagreement'])} | {share(b['disagreement'])} | {a['nats']:.4f} | {b['nats']:.4f}"
        cells = f"{risks} | {a['depth']:.2f} | {b['depth']:.2f}"
        rows.append(f"| {at_of(row['trigger'])} | {cells} |")
    return "\n".join(rows)


def plot(found: dict[str, Any]) -> str:
    """Risk against cost, every rule and reference; full depth is the line at 30 blocks."""
    series: dict[str, list[tuple[float, float]]] = {
        "certified rules, own text": [(r["own"]["disagreement"], r["own"]["cost"]) for r in found["rules"]],
        "the same, replayed": [(r["replayed"]["disagreement"], r["replayed"]["cost"]) for r in found["rules"]],
        **{name: [(p["risk"], p["cost"]) for p in points] for name, points in found["references"].items()},
    }

    def x(risk: float) -> float:
        place = log10(min(max(risk, LOWEST), HIGHEST) / LOWEST) / log10(HIGHEST / LOWEST)
        return LEFT + place * (WIDTH - LEFT - RIGHT)

    def y(depth: float) -> float:
        return TOP + (DEEPEST - depth) / (DEEPEST - SHALLOWEST) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for risk in (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        parts.append(f'<path d="M{x(risk):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e5e5e5"/>')
        label = f"{risk:.1%}" if risk < 0.01 else f"{risk:.0%}"
        parts.append(f'<text x="{x(risk):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    for depth in (10, 15, 20, 25, 30, 35):
        colour = "#999999" if depth == 30 else "#e5e5e5"
        parts.append(f'<path d="M{LEFT} {y(depth):.1f}H{WIDTH - RIGHT}" stroke="{colour}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(depth) + 4:.1f}" text-anchor="end">{depth}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 12}" text-anchor="middle">tokens that differ from full depth (log scale)</text>'
    )
    parts.append(
        f'<text x="16" y="{(TOP + HEIGHT - BOTTOM) / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(TOP + HEIGHT - BOTTOM) / 2:.0f})">blocks for a token, a look counting 0.6</text>'
    )
    for place, (name, points) in enumerate(series.items()):
        colour = COLOURS[name]
        line = " ".join(f"{x(r):.1f},{y(d):.1f}" for r, d in points)
        if name != "fixed depth":
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x(r):.1f}" cy="{y(d):.1f}" r="3.2" fill="{colour}"/>' for r, d in points]
        at = TOP + 12 + 20 * place
        parts.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{at - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 26}" y="{at}">{name}{" (risk 0)" if name == "oracle" else ""}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def filled(text: str, found: dict[str, Any]) -> str:
    """The page with every table between its markers made anew."""
    tables: dict[str, Callable[[], str]] = {
        "levels": lambda: levels_table(found),
        "nats": lambda: nats_table(found),
        "splits": lambda: splits_table(found, "disagreement"),
        "splits-nats": lambda: splits_table(found, "log_loss"),
        "rules": lambda: rules_table(found),
        "drift": lambda: drift_table(found),
        "propagate": propagate_table,
    }
    for name, table in tables.items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, count=1, flags=re.DOTALL)
        assert count == 1, f"docs/reflex.md has no table:{name}"
    return text


if __name__ == "__main__":
    result = json.loads(RESULT.read_text())
    page, drawn = filled(PAGE.read_text(), result), plot(result)
    if "--check" in sys.argv and (page != PAGE.read_text() or not PLOT.exists() or drawn != PLOT.read_text()):
        sys.exit("docs/reflex.md is not current; run: python tools/reflex_page.py")
    PAGE.write_text(page)
    PLOT.write_text(drawn)
