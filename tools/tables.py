"""Fill the tables in README.md, docs/limits.md and docs/gemma.md from exits and the files in docs/results (``make tables``)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
EXITS = ROOT / "src" / "adi" / "data" / "exits" / "smollm2-135m" / "exits.json"


def exits_table(file: Path = EXITS) -> str:
    """Agreement per depth, and what the default trigger makes of it."""
    found = json.loads(file.read_text())
    report = found["report"]
    held = report["held_out"]
    rows = [
        f"| depth (of {found['layers']}) | exit agrees | untrained head | decides (of all tokens) | and is then right |",
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


def bench_table(file: str, mode: str = "full") -> str:
    """Where adi stands: every contestant by speed, and how many times faster adi is in this mode; errors as a footnote."""
    found: dict[str, Any] = json.loads((RESULTS / file).read_text())
    ran = sorted((run for run in found["runs"] if run["error"] is None), key=lambda run: -run["tokens_per_second"])
    ours = [run["name"] for run in ran if run["name"].startswith(f"adi:{mode}:")]
    bases = [name for name in (f"adi:{mode}:int4", f"adi:{mode}:int8") if name in ours] or ours[:1]
    ratios = {(ratio["a"], ratio["b"]): ratio for ratio in found["ratios"]}
    rows = [
        "| | tokens/s | first token, ms | " + "".join(f"`{base}` / this | " for base in bases) + "same text | peak MiB |",
        "|---|---:|---:|" + "---:|" * len(bases) + "---:|---:|",
    ]
    for run in ran:
        name = run["name"]
        cells = [f"{run['tokens_per_second']:.1f}", f"{1e3 * run['ttft_seconds']:.0f}"]
        for base in bases:
            ratio = ratios.get((base, name))
            cells.append("" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
        cells.append("" if run["match"] is None else f"{run['match']:.0%}")
        cells.append("" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**20:.0f}")
        rows.append(f"| {'**' * (name in bases)}{name}{'**' * (name in bases)} | " + " | ".join(cells) + " |")
    where = ", ".join(filter(None, (found.get("processor"), found["machine"], f"{found['threads']} threads")))
    how = "Ratios of tokens/s: medians over prompts, 95% interval."
    failed = [run for run in found["runs"] if run["error"] is not None]
    notes = [f"`{found['command']}`: {found['prompts']} prompts, {where}. {how}"]
    notes += [f"{run['name']} did not run: {' '.join(run['error'].split()).rstrip('.')}." for run in failed]
    return "\n".join(rows) + "\n\n" + "\n".join(notes)


def categories_table(file: str = "ladder.json", modes: Sequence[str] = ("full", "lookup"), peers: Sequence[str] = ()) -> str:
    """Verified against full depth and other modes at the same precision, and against peers, by kind of prompt."""
    found: dict[str, Any] = json.loads((RESULTS / file).read_text())
    ratios = {(ratio["a"], ratio["b"]): ratio for ratio in found["ratios"]}
    pairs = [
        (f"adi:verified:{p}", b) for p in ("int4", "int8", "fp32") for b in (*(f"adi:{mode}:{p}" for mode in modes), *peers)
    ]
    shown = [pair for pair in pairs if pair in ratios]
    kinds = sorted(ratios[shown[0]]["per_category"])
    rows = ["| | " + " | ".join(f"`{a}` / `{b}`" for a, b in shown) + " |", "|---|" + "---:|" * len(shown)]
    for kind in kinds:
        rows.append(f"| {kind} | " + " | ".join(f"{_middle(ratios[pair]['per_category'][kind]):.2f}" for pair in shown) + " |")
    return "\n".join(rows)


def _middle(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)


def habits_table() -> str:
    """Tokens per full pass as the same kinds of task come again, and of unrelated ones between them."""
    found: dict[str, Any] = json.loads((RESULTS / "habits.json").read_text())
    rows = ["| time | same kind: with habits | without | ratio | unrelated: with | without | ratio |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|")
    for row in found["by_time"]:
        cells = [row["time"]]
        for kind in (row["same"], row["unrelated"]):
            ratio = f"{kind['ratio']:.2f} ({kind['low']:.2f} to {kind['high']:.2f})"
            cells += [f"{kind['habits']:.2f}", f"{kind['none']:.2f}", ratio]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + f"\n\n`python tools/habit.py`: {found['tokens']} tokens at most each, {found['precision']}."


def quality_table(file: str = "quality.json") -> str:
    """Perplexity and predictions of each precision against float32."""
    found: dict[str, Any] = json.loads((RESULTS / file).read_text())
    rows = [
        "| precision | perplexity | against float32 | KL divergence, nats | same likeliest token |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in found["precisions"]:
        error = f" ± {row['ratio_error']:.2%}" if "ratio_error" in row else ""
        cells = f"{row['perplexity']:.2f} | {row['ratio'] - 1:+.2%}{error} | {row['divergence']:.4f} | {row['same_token']:.1%}"
        rows.append(f"| {row['precision']} | {cells} |")
    return "\n".join(rows) + f"\n\n`{found['command']}`: {found['tokens']:,} tokens of the built-in bench prompts."


def batch_table() -> str:
    """Many prompts at once against one after the other."""
    found: dict[str, Any] = json.loads((RESULTS / "batch.json").read_text())
    rows = ["| precision | one at a time, tokens/s | together, tokens/s | ratio (lowest to highest pair) | same tokens |"]
    rows.append("|---|---:|---:|---:|---:|")
    for row in found["precisions"]:
        ratio = f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        speeds = f"{row['one_tokens_per_second']:.1f} | {row['batch_tokens_per_second']:.1f}"
        rows.append(f"| {row['precision']} | {speeds} | {ratio} | {'yes' if row['same'] else 'no'} |")
    limit = "at most" if found.get("ends") else "each"  # whether texts could end before
    what = f"{found['prompts']} prompts, {found['max_new_tokens']} tokens {limit}, {found['pairs']} pairs of runs in turn"
    return "\n".join(rows) + f"\n\n`{found['command']}`: {what}."


def demo_block() -> str:
    """What ``make demo`` printed."""
    return "```\n" + (RESULTS / "demo.txt").read_text().rstrip() + "\n```"


def inspect_table(file: str) -> str:
    """What blocks and head cost by the number of rows, and what the model's own head says at each depth, untrained."""
    found: dict[str, Any] = json.loads((RESULTS / file).read_text())
    cost = found["cost"]
    rows = ["| rows | one block, ms | all blocks, ms | head, ms | head in blocks |", "|---:|---:|---:|---:|---:|"]
    columns = (cost["rows"], cost["block_seconds"], cost["blocks_seconds"], cost["head_seconds"])
    for count, block, blocks, head in zip(*columns, strict=True):
        rows.append(f"| {count} | {1e3 * block:.2f} | {1e3 * blocks:.1f} | {1e3 * head:.1f} | {head / block:.1f} |")
    said = ", ".join(f"{depth}: {share:.0%}" for depth, share in found["agreement"].items())
    about = f"`{found['command']}`: medians. Untrained, the model's own head says full depth's token at depth"
    return "\n".join(rows) + f"\n\n{about} {said} ({found['tokens']} tokens). {found['advice']}"


def drafter_table(file: Path) -> str:
    """How the drafter fares on held-out text, step by step."""
    judged: dict[str, Any] = json.loads(file.read_text())["report"]["drafter"]
    steps = judged["agreement_by_step"]
    rows = [
        "| step | " + " | ".join(str(step) for step in range(1, len(steps) + 1)) + " | accepted of 5 in a row |",
        "|---|" + "---:|" * (len(steps) + 1),
        "| agrees | " + " | ".join(f"{share:.1%}" for share in steps) + f" | {judged['accepted_in_a_row']:.2f} |",
    ]
    what = f"{judged['positions']:,} held-out tokens; {judged['answer_tokens']:,} tokens to train on."
    return "\n".join(rows) + f"\n\nEach step where those before it agreed. {what}"


def bound_table() -> str:
    """Costs and acceptance, and what they allow at best."""
    found: dict[str, Any] = json.loads((RESULTS / "bound.json").read_text())
    names = [row["precision"] for row in found["precisions"]]
    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("a pass of 1, 2, 3, 4, 8 rows, ms", lambda r: ", ".join(f"{1e3 * r['pass_seconds'][n]:.1f}" for n in "12348")),
        ("1, 2, 3 steps of the drafter, ms", lambda r: ", ".join(f"{1e3 * seconds:.1f}" for seconds in r["draft_seconds"])),
        ("drafts right at steps 1 to 5", lambda r: ", ".join(f"{share:.0%}" for share in r["agreement_by_step"])),
        ("the drafter alone, at best", lambda r: f"{r['gain']:.2f} x, with {r['drafts']} draft{'s' * (r['drafts'] != 1)}"),
        (f"for {found['wanted']} x, all steps right more often by", lambda r: _points(r["needed_points"])),
    ]
    rows = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    rows += [f"| {name} | " + " | ".join(say(row) for row in found["precisions"]) + " |" for name, say in lines]
    where = ", ".join(filter(None, (found.get("processor"), found["machine"])))
    positions = " and ".join(f"{row['positions']:,}" for row in found["precisions"])
    about = f"`{found['command']}`: {positions} tokens of greedy answers to the bench prompts, {where}."
    return "\n".join(rows) + f"\n\n{about} A step counts where those before it were right."


def _points(needed: float | None) -> str:
    return "never" if needed is None else f"{100 * needed:.0f} points"


def bound_categories() -> str:
    """First drafts, and accepted in a row, by category."""
    found: dict[str, Any] = json.loads((RESULTS / "bound.json").read_text())["precisions"]
    rows = ["| | " + " | ".join(f"{r['precision']}: first right | in a row, of 5" for r in found) + " |"]
    rows.append("|---|" + "---:|---:|" * len(found))
    for kind in found[0]["by_category"]:
        each = [r["by_category"][kind] for r in found]
        cells = " | ".join(f"{e['agreement_by_step'][0]:.0%} | {e['accepted_in_a_row']:.2f}" for e in each)
        rows.append(f"| {kind} | {cells} |")
    return "\n".join(rows)


def if_measured(table: Callable[[], str], needs: Path) -> Callable[[], str]:
    """The table, or a word that its file is not there yet."""
    return lambda: table() if needs.exists() else f"*Not measured yet: {needs.name} is missing.*"


TABLES: dict[str, Callable[[], str]] = {
    "exits": exits_table,
    "triggers": triggers_table,
    "fp32": lambda: bench_table("fp32.json"),
    "bf16": lambda: bench_table("bf16.json", "verified"),
    "ttft": lambda: bench_table("ttft.json"),
    "peers": lambda: bench_table("peers.json", "verified"),
    "ladder": lambda: bench_table("ladder.json", "verified"),
    "ladder-avx2": lambda: bench_table("ladder_avx2.json", "verified"),
    "categories": categories_table,
    "categories-avx2": lambda: categories_table("ladder_avx2.json", ("full", "static"), ("llama.cpp",)),
    "habits": habits_table,
    "quality": quality_table,
    "batch": batch_table,
    "demo": demo_block,
}
GEMMA_EXITS = RESULTS / "gemma_exits.json"
GEMMA = {
    "inspect": (lambda: inspect_table("gemma_inspect.json"), RESULTS / "gemma_inspect.json"),
    "exits": (lambda: exits_table(GEMMA_EXITS), GEMMA_EXITS),
    "drafter": (lambda: drafter_table(GEMMA_EXITS), GEMMA_EXITS),
    "quality": (lambda: quality_table("gemma_quality.json"), RESULTS / "gemma_quality.json"),
    "bench": (lambda: bench_table("gemma.json", "verified"), RESULTS / "gemma.json"),
}
LIMITS = {
    "bound": (bound_table, RESULTS / "bound.json"),
    "bound-categories": (bound_categories, RESULTS / "bound.json"),
}
PAGES = {
    ROOT / "docs" / "limits.md": {name: if_measured(*parts) for name, parts in LIMITS.items()},
    ROOT / "README.md": TABLES,
    ROOT / "docs" / "gemma.md": {name: if_measured(*parts) for name, parts in GEMMA.items()},
}


def filled(page: Path, text: str) -> str:
    """The page with every table between its markers made anew."""
    for name, table in PAGES[page].items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, count=1, flags=re.DOTALL)
        assert count == 1, f"{page.name} has no table:{name}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        new = filled(page, page.read_text())
        if "--check" in sys.argv and new != page.read_text():
            sys.exit(f"{page.name} is not current; run: make tables")
        page.write_text(new)
