"""Fill the tables in README.md from the shipped exits and the files in docs/results (``make tables``)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
EXITS = ROOT / "src" / "adi" / "data" / "exits" / "smollm2-135m" / "exits.json"


def exits_table() -> str:
    """Agreement per depth, and what the default trigger makes of it."""
    report = json.loads(EXITS.read_text())["report"]
    held = report["held_out"]
    rows = [
        "| depth (of 30) | exit agrees | untrained head | decides (of all tokens) | and is then right |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in report["depths"]:
        shares = (row["agreement"], row["bare_agreement"], row["fires"], row["precision"])
        rows.append(f"| {row['depth']} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    note = (
        f"\n\n{held['rows']:,} tokens of {held['sequences']} held-out answers; {report['training_tokens']:,} answer tokens to "
        f"train on; {held['shortlist_coverage']:.1%} of the full model's tokens are in the shortlist."
    )
    return "\n".join(rows) + note


def triggers_table() -> str:
    """AUROC per signal and depth, and what asking costs."""
    scores: list[dict[str, Any]] = json.loads((RESULTS / "triggers.json").read_text())["scores"]
    depths = sorted({score["depth"] for score in scores})
    signals = list(dict.fromkeys(score["signal"] for score in scores))
    found = {(score["signal"], score["depth"]): score for score in scores}
    rows = [
        "| signal | " + " | ".join(f"depth {d}" for d in depths) + " | cost, of a block |",
        "|---|" + "---:|" * (len(depths) + 1),
    ]
    for signal in signals:
        mine = [found[signal, depth] for depth in depths]
        values = ["-" if s["auroc"] is None else f"{s['auroc']:.2f}" for s in mine]
        shares = sorted(s["share_of_block"] for s in mine)
        rows.append(f"| {signal} | " + " | ".join(values) + f" | {shares[len(shares) // 2]:.0%} |")
    return "\n".join(rows)


def demo_block() -> str:
    """What ``make demo`` printed."""
    return "```\n" + (RESULTS / "demo.txt").read_text().rstrip() + "\n```"


def filled(text: str) -> str:
    """The README with every table between its markers made anew."""
    for name, table in (("exits", exits_table), ("triggers", triggers_table), ("demo", demo_block)):
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, count=1, flags=re.DOTALL)
        assert count == 1, f"README.md has no table:{name}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    new = filled(readme.read_text())
    if "--check" in sys.argv and new != readme.read_text():
        sys.exit("README.md is not current; run: make tables")
    readme.write_text(new)
