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
        asked = row["threshold"] is not None
        decides = (f"{row['fires']:.1%}", f"{row['precision']:.1%}") if asked else ("not looked at", "")
        cells = (f"{row['agreement']:.1%}", f"{row['bare_agreement']:.1%}", *decides)
        rows.append(f"| {row['depth']} | " + " | ".join(cells) + " |")
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
    agreement = {score["depth"]: score["agreement"] for score in scores}
    rows.append("| *the exit agrees* | " + " | ".join(f"*{agreement[d]:.0%}*" for d in depths) + " | |")
    for signal in signals:
        mine = [found[signal, depth] for depth in depths]
        values = ["-" if s["auroc"] is None else f"{s['auroc']:.2f}" for s in mine]
        shares = sorted(s["share_of_block"] for s in mine)
        rows.append(f"| {signal} | " + " | ".join(values) + f" | {shares[len(shares) // 2]:.0%} |")
    return "\n".join(rows)


def bench_table() -> str:
    """Speed of every contestant, and its ratio to full depth."""
    found: dict[str, Any] = json.loads((RESULTS / "bench.json").read_text())
    base = found["runs"][0]["name"]
    ratios = {r["b"]: r for r in found["ratios"] if r["a"] == base} | {r["a"]: r for r in found["ratios"] if r["b"] == base}
    rows = [
        f"| | tokens/s | against {base} (95% interval) | tokens a round | drafts accepted | same text | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for run in found["runs"]:
        name = run["name"]
        if run["error"] is not None:
            rows.append(f"| {name} | did not run: {run['error']} | | | | | |")
            continue
        ratio = "1"
        if name != base:
            r = ratios[name]
            low, mid, high = r["low"], r["median"], r["high"]
            if r["a"] == base:  # the file has full depth over the other; turn it round
                low, mid, high = 1 / high, 1 / mid, 1 / low
            ratio = f"{mid:.2f} ({low:.2f} to {high:.2f})"
        cells = (
            f"{run['tokens_per_second']:.1f}",
            ratio,
            "" if run["tokens_per_round"] is None else f"{run['tokens_per_round']:.2f}",
            "" if run["accepted_share"] is None else f"{run['accepted_share']:.0%}",
            "" if run["match"] is None else f"{run['match']:.0%}",
            f"{run['peak_bytes'] / 2**20:.0f}",
        )
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return (
        "\n".join(rows)
        + f"\n\n`{found['command']}`: {found['prompts']} prompts, {found['machine']}, {found['threads']} threads."
    )


def demo_block() -> str:
    """What ``make demo`` printed."""
    return "```\n" + (RESULTS / "demo.txt").read_text().rstrip() + "\n```"


def filled(text: str) -> str:
    """The README with every table between its markers made anew."""
    for name, table in (("exits", exits_table), ("triggers", triggers_table), ("bench", bench_table), ("demo", demo_block)):
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
