"""The tables and the drawing of docs/habits.md that come from ``adi study exposure``, ``familiarity`` and ``knowledge``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Load = Callable[[str], Result]
Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
COLORS = {"looped": "#2a6f97", "plain": "#b5512b"}


def _slope(found: Result | None, digits: int = 3) -> str:
    if found is None:
        return ""
    low, high = found["interval"]
    return f"{found['slope']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _change(found: Result) -> str:
    return f"{found['change']:+.2f} ({found['interval'][0]:+.2f} to {found['interval'][1]:+.2f})"


def _prices(files: Sequence[Result]) -> list[tuple[str, Result, Result]]:
    """Shape, what was found at a price, and its differences to price 0."""
    found = []
    for file in files:
        for shape in file["shapes"]:
            minus = {row["price"]: row for row in shape["minus_price_0"]}
            gates = {row["price"]: row for row in shape["gate_only"]}
            for price in shape["prices"]:
                at = price["price"]
                found.append((shape["shape"], price, {"minus": minus.get(at), "gate": gates.get(at)}))
    return found


def exposure(load: Load, table: Table) -> str:
    """Slopes of depth on exposure, by shape and price."""
    rows = []
    for shape, price, _ in _prices([load("exposure.json")]):
        slopes, chance = price["slopes"], price["slopes"]["worked_out"]["settled"]["permuted"]
        rows.append(
            [
                f"{shape}, {price['price']:g}",
                _slope(slopes["worked_out"]["settled"]),
                _slope(slopes["equal"]["settled"]),
                _slope(slopes["worked_out"]["halted"]),
                ", ".join(f"{value:+.3f}" for value in price["by_seed"]),
                f"{chance[0]:+.3f} to {chance[1]:+.3f}",
                _change(price["top"]["all"]),
            ]
        )
    head = ["shape, price", "settled", "settled, sure ones", "gate halts", "settled, by seed", "permuted", "256 less 0"]
    masked = []
    for shape, price, _ in _prices([load("exposure.json")]):
        sides = [price["masked"][name] for name in ("never_met", "learned", "masked")]
        cells = [f"{s['mean']:.2f} ({s['interval'][0]:.2f} to {s['interval'][1]:.2f})" for s in sides]
        mentions = [price["mentions"][n]["settled"] for n in (1, 3)]
        again = [f"{m['change']:+.3f} ({m['interval'][0]:+.3f} to {m['interval'][1]:+.3f})" for m in mentions]
        masked.append([f"{shape}, {price['price']:g}", *cells, *again])
    names = ["shape, price", "never met", "64 times", "64 times, masked", "2nd time in a text", "8th time in a text"]
    return f"{table(head, rows)}\n\n{table(names, masked)}"


def cause(load: Load, table: Table) -> str:
    """What a price adds to the slope, to models and to gates that were trained alone."""
    rows = []
    for shape, price, more in _prices([load("exposure.json"), load("exposure_high.json")]):
        if more["minus"] is not None:
            halted = [more["minus"]["halted"], more["gate"]["halted"], more["gate"]["trained_minus_gate_only"]]
            mean = sum(row["halted"] for row in price["levels"] if row["hops"] != "1")
            count = sum(row["hops"] != "1" for row in price["levels"])
            cells = [_slope(more["minus"]["settled"]), f"{mean / count:.2f}", *map(_slope, halted)]
            rows.append([f"{shape}, {price['price']:g}", *cells])
    head = [
        "shape, price",
        "settled, less price 0",
        "gate halts at",
        "gate, less price 0",
        "gate alone, slope",
        "both trained, less gate alone",
    ]
    return table(head, rows)


def devaluation(load: Load, table: Table, price: float = 0.1) -> str:
    """Old answers by turn and number of examples, slips, and the monitor's delay."""
    groups = {"fact": "the fact itself", "familiar": "over it, familiar", "new": "over it, new"}
    rows, later, follow = [], [], []
    for shape, found, _ in _prices([load("exposure.json")]):
        runs = found["devaluation"]
        known = {(row["group"], row["examples"]): row for row in runs["rows"]}
        if found["price"] == price:
            for group, what in groups.items():
                for examples in (0, 4, 8, 16, 32):
                    row = known[group, examples]
                    turns = [f"{100 * old:.0f} / {100 * new:.0f}" for old, new in zip(row["old"], row["new"], strict=True)]
                    rows.append([f"{shape}, {what}", str(examples), *turns])
        at = known["fact", 8]
        alarms = [
            next((f"{d['alarm_after']} (risk {d['risk']:.0%})" for d in run if d["examples"] == 8 and d["alarm_after"]), "none")
            for run in runs["delays"]
        ]
        false = sum(d["alarm_after"] is not None for run in runs["delays"] for d in run if d["examples"] == 0)
        lag = runs["lag"]
        behind = f"{lag['mean']:.2f} ({lag['interval'][0]:.2f} to {lag['interval'][1]:.2f})"
        shares = [behind, *(f"{at[name]:.0%}" for name in ("slips", "outlived", "first_outlived"))]
        later.append([f"{shape}, {found['price']:g}", *shares, ", ".join(alarms), str(false)])
        turns = [_half(runs["rows"], turn) for turn in range(len(at["old"]))]
        follow.append([f"{shape}, {found['price']:g}", *turns])
    head = ["old / new answer, %", "examples", "turn 1", "turn 2", "turn 3", "turn 4"]
    half = ["examples until most answers are new", "turn 1", "turn 2", "turn 3", "turn 4"]
    more = [
        "after 8 examples",
        "turn 1 behind turn 4",
        "reflex slips",
        "to the old answer",
        "turn 1 would",
        "alarm after",
        "false alarms",
    ]
    return "\n\n".join([table(head, rows), table(half, follow), table(more, later)])


def _half(rows: Sequence[Result], turn: int) -> str:
    """The first number of examples of a fact after which a turn says its new answer in more than half of the questions."""
    mine = [row for row in rows if row["group"] == "fact"]
    return next((str(row["examples"]) for row in mine if row["new"][turn] > 0.5), f"over {mine[-1]['examples']}")


def knowledge(load: Load, table: Table) -> str:
    """Accuracy of probes by turn, for products and for hops."""
    products = load("knowledge.json")
    parts = []
    for name, what in (("answer", "last RESET k ago"), ("on_the_way", "last RESET further back")):
        parts.append(_probes(products[name]["rows"], f"product of the last k, {what}: k", table))
    reached = products["answer"]
    verdict = f"{reached['verdict']}, {reached['factor_a_turn']:.2f} times as far with each turn"
    parts.append(f"Known back to {', '.join(map(str, reached['reach']))} elements, turn by turn: {verdict}.")
    for shape, price, _ in _prices([load("exposure.json")]):
        if price["price"] == 0:
            parts.append(_probes(price["knowledge"]["rows"], f"{shape}: the name after hop", table))
    return "\n\n".join(parts)


def _probes(rows: Sequence[Result], label: str, table: Table) -> str:
    turns, steps = (sorted({row[name] for row in rows}) for name in ("turn", "steps"))
    known = {(row["steps"], row["turn"]): row for row in rows}
    body = []
    for k in steps:
        last = known[k, turns[-1]]
        cells = [f"{known[k, turn]['accuracy']:.2f}" for turn in turns]
        body.append([str(k), *cells, f"{last['shuffled']:.2f}", f"{max(known[k, t]['untrained'] for t in turns):.2f}"])
    return table([label, *(f"turn {turn}" for turn in turns), "shuffled", "untrained"], body)


def familiarity(load: Load, table: Table) -> str:
    """The default model as it is."""
    found = load("familiarity.json")
    names = {
        "repetition": "a doubling of times in this context",
        "count": "a doubling of 1 + count of the 4-gram in other answers",
        "own_order": "its own order against shuffled",
    }
    rows = []
    for name, what in names.items():
        if (one := found[name]) is not None:
            rows.append([what, _slope(one, 2), f"{one['with_nothing_held_equal']:+.2f}"])
    means = [(f"time {k}", row) for k, row in enumerate(found["by_mention"], 1)] + [("shuffled", found["shuffled"])]
    body = [
        [what, f"{row['depth']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})", f"{row['surprise']:.2f}"]
        for what, row in means
    ]
    head = [f"blocks of {found['layers']} for", "at equal surprise", "nothing held equal"]
    return f"{table(head, rows)}\n\n{table(['its own answers, read for the', 'depth, blocks', 'surprise, nats'], body)}"


def drawing(load: Load) -> str:
    """Depth by exposures of each shape at price 0 (left), and the slope over training (right), as SVG."""
    shapes = {shape: price for shape, price, _ in _prices([load("exposure.json")]) if price["price"] == 0}
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 300" font-family="sans-serif" font-size="12">',
        '<rect width="720" height="300" fill="white"/>',
        '<text x="40" y="20">turn from which the answer stays, by exposures</text>',
        '<text x="400" y="20">its slope a doubling, over steps of training</text>',
    ]
    for n, (shape, price) in enumerate(shapes.items()):
        levels = [row for row in price["levels"] if row["hops"] != "1"]
        left = [(40 + 30 * i, 270 - 200 * (row["settled"] - 2.4)) for i, row in enumerate(levels)]
        parts.append(_line(left, COLORS[shape]))
        if n == 0:
            parts += [
                f'<text x="{40 + 30 * i}" y="290" text-anchor="middle">{r["exposures"]}</text>' for i, r in enumerate(levels)
            ]
        last = max(row["step"] for row in price["emergence"])
        right = [(400 + 290 * row["step"] / last, _height(row["slope"]["slope"])) for row in price["emergence"]]
        for row, (x, _) in zip(price["emergence"], right, strict=True):
            low, high = (_height(value) for value in row["slope"]["interval"])
            parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{COLORS[shape]}" stroke-opacity=".4"/>')
        parts.append(_line(right, COLORS[shape]))
        parts.append(f'<text x="{600 + 50 * n}" y="40" fill="{COLORS[shape]}">{shape}</text>')
    for value in (2.5, 3.0, 3.5):
        parts.append(f'<text x="8" y="{274 - 200 * (value - 2.4):.0f}">{value:g}</text>')
    for value in (0.0, -0.05, -0.1):
        parts.append(f'<text x="360" y="{_height(value) + 4:.0f}">{value:g}</text>')
    parts.append(f'<path d="M400 {_height(0.0):.1f}H690" stroke="#999"/>')
    return "\n".join([*parts, "</svg>", ""])


def _height(slope: float) -> float:
    return 80 - 1700 * slope


def _line(points: Sequence[tuple[float, float]], color: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"/>{dots}'


MAKE = {"exposure": exposure, "cause": cause, "devaluation": devaluation, "knowledge": knowledge, "familiarity": familiarity}
DRAWING = Path("docs") / "images" / "exposure.svg"
