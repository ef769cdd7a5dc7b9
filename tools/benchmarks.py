"""Write docs/benchmarks.md and the table of README.md from the files in docs/results (``make tables``).

``--check`` writes nothing and fails where a page is not current. ``--made FILE...`` notes today's date and the commit for
results that have just been measured (``make results`` does this).
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import exposure_tables
import jinja2
import lengths as long_texts
import size_tables
import starts as start_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
MADE = RESULTS / "made.json"
EXITS = ROOT / "src" / "adi" / "data" / "exits" / "smollm2-135m" / "exits.json"
README_ROWS = {
    "adi:verified:int8": "**adi, verified (default)**",
    "adi:full:int8": "adi, full depth",
    "adi:lookup:int8": "adi, prompt lookup",
    "openvino-genai:int8": "OpenVINO GenAI",
    "llama.cpp": "llama.cpp, Q4_1",
}
MACHINES = {  # processor and machine, as adi records them -> key and description
    ("Intel(R) Xeon(R) Processor @ 2.50GHz", "x86_64, 2 cores, AVX-512 VNNI, Linux"): (
        "A",
        "2 cores of an Intel Xeon at 2.5 GHz, AVX-512 with VNNI, no bfloat16; a virtual machine",
    ),
    ("AMD EPYC", "x86_64, 2 cores, Linux"): ("B", "2 cores of an AMD EPYC, AVX-512 with bfloat16; a virtual machine"),
    ("AMD EPYC", "x86_64, 2 cores, AVX2, Linux"): ("C", "2 cores of an AMD EPYC, AVX2 only; a virtual machine"),
    ("AMD EPYC", "x86_64, 2 cores, AVX-512 VNNI, Linux"): (
        "D",
        "2 cores of an AMD EPYC, AVX-512 with VNNI and bfloat16; a virtual machine",
    ),
}
Result = dict[str, Any]


def load(file: str) -> Result:
    found: Result = json.loads((RESULTS / file).read_text())
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def today(command: str) -> str:
    """The command by today's names: the prompts of the benchmark were called builtin before."""
    return command.replace("--prompts builtin", "--prompts bench")


def source(file: str) -> str:
    """Which machine, day, commit, and command a table comes from."""
    found, made = load(file), json.loads(MADE.read_text())[file]
    where = (found["processor"], found["machine"])
    if where not in MACHINES:
        raise SystemExit(f"docs/results/{file} was made on {', '.join(where)}: name this machine in tools/benchmarks.py")
    return f"[Machine {MACHINES[where][0]}](#machines), {made['date']}, commit {made['commit']}:\n`{today(found['command'])}`"


def origin(file: str) -> str:
    """The same on another page than benchmarks.md, where the machines stand."""
    return source(file).replace("(#machines)", "(benchmarks.md#machines)")


def machines() -> str:
    """The machines that results were measured on."""
    found = [load(file) for file in json.loads(MADE.read_text())]
    used = {(result["processor"], result["machine"]) for result in found if "processor" in result}
    rows = [[key, what] for where, (key, what) in MACHINES.items() if where in used]
    return "\n".join(["| machine | processor |", "|---|---|", *(f"| {key} | {what} |" for key, what in rows)])


def interval(ratio: Result | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def ratios(found: Result) -> dict[tuple[str, str], Result]:
    return {(ratio["a"], ratio["b"]): ratio for ratio in found["ratios"]}


def cells(run: Result, compared: Sequence[Result | None]) -> list[str]:
    """Speed, first token, how much faster the systems in bold are, identical texts, peak memory."""
    return [
        f"{run['tokens_per_second']:.1f}",
        f"{1e3 * run['ttft_seconds']:.0f}",
        *map(interval, compared),
        "" if run["match"] is None else f"{run['match']:.0%}",
        "" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**20:.0f}",
    ]


def bench(file: str, mode: str = "verified", precisions: Sequence[str] = ("int4", "int8", "fp32")) -> str:
    """Every system of a benchmark by speed, and how many times faster adi is in this mode."""
    found = load(file)
    ran = sorted((run for run in found["runs"] if run["error"] is None), key=lambda run: -run["tokens_per_second"])
    ours = [f"adi:{mode}:{precision}" for precision in precisions]
    bases, known = [name for name in ours if any(run["name"] == name for run in ran)], ratios(found)
    head = ["", "tokens/s", "first token, ms", *(f"`{base}` / this" for base in bases), "same text", "peak MiB"]
    rows = []
    for run in ran:
        name = f"**{run['name']}**" if run["name"] in bases else run["name"]
        rows.append([name, *cells(run, [known.get((base, run["name"])) for base in bases])])
    failed = [f"\n{run['name']} did not run: {' '.join(run['error'].split())}" for run in found["runs"] if run["error"]]
    return f"{table(head, rows)}\n\n{source(file)} ({found['prompts']} prompts)." + "".join(failed)


def batches(file: str) -> str:
    """Many prompts in shared passes, by precision and number of them, beside OpenVINO GenAI's continuous batching."""
    ran = {(batch["name"], batch["batch"]): batch for batch in load(file)["batches"] if batch["error"] is None}
    rows = []
    for precision in dict.fromkeys(name.rsplit(":", 1)[-1] for name, _ in ran):
        full, verified, peer = (f"{kind}:{precision}" for kind in ("adi:full", "adi:verified", "openvino-genai"))
        for size in dict.fromkeys(size for _, size in ran):
            one, other, theirs = (ran.get((name, size)) for name in (full, verified, peer))
            if one is None or other is None or theirs is None:
                continue
            pairs = (interval(one["against"][peer]), interval(other["against"][peer]), interval(other["against"][full]))
            alone = ["yes" if run["same"] else "no" for run in (one, other, theirs)]
            speeds = [f"{run['tokens_per_second']:.0f}" for run in (one, other, theirs)]
            rows.append([precision, str(size), *speeds, *pairs, ", ".join(alone)])
    ours = ["full depth", "verified", "GenAI", "full depth / GenAI", "verified / GenAI", "verified / full depth"]
    return f"{table(['', 'at once', *ours, 'each as alone'], rows)}\n\n{source(file)}."


def lengths(file: str) -> str:
    """Prefill, decoding and memory by length."""
    image = "![memory, prefill and decoding over the length](images/lengths.svg)"
    return f"{long_texts.lengths_table(load(file))}\n\n{image}\n\n{source(file)}."


def lengths_alone(file: str) -> str:
    """The same without a picture."""
    return f"{long_texts.lengths_table(load(file))}\n\n{source(file)}."


def starts(file: str) -> str:
    """Starts and memory beside GenAI."""
    return f"{start_tables.starts_table(load(file))}\n\n{source(file)}."


def then_and_now() -> str:
    """What was measured when size, length and load were begun, and what is now."""
    return size_tables.then_and_now(RESULTS, load, table)


def categories(file: str, others: Sequence[str]) -> str:
    """Verified decoding against ``others`` (``{p}`` stands for the precision) by category of prompt."""
    known = ratios(load(file))
    pairs = [(f"adi:verified:{p}", other.format(p=p)) for p in ("int4", "int8") for other in others]
    kinds = sorted(known[pairs[0]]["per_category"])
    rows = [[kind, *(f"{_middle(known[pair]['per_category'][kind]):.2f}" for pair in pairs)] for kind in kinds]
    return table(["", *(f"`{a}` / `{b}`" for a, b in pairs)], rows)


def _middle(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)


def quality(file: str) -> str:
    """Perplexity and predictions of each precision against float32."""
    found = load(file)
    rows = []
    for row in found["precisions"]:
        error = f" ± {row['ratio_error']:.2%}" if "ratio_error" in row else ""
        change = f"{row['ratio'] - 1:+.2%}{error}" if row["precision"] != "fp32" else ""
        figures = [f"{row['perplexity']:.2f}", change, f"{abs(row['divergence']):.4f}", f"{row['same_token']:.1%}"]
        kept = ", keys and values in 8 bits" * (row.get("kv_precision") == "int8")
        rows.append([row["precision"] + kept, *figures])
    head = ["precision", "perplexity", "against float32", "KL divergence, nats", "same likeliest token"]
    return f"{table(head, rows)}\n\n{source(file)} ({found['tokens']:,} tokens of the bench prompts)."


def exits(file: Path = EXITS) -> str:
    """Agreement per depth, and what the default trigger makes of it."""
    found = json.loads(file.read_text())
    held = found["report"]["held_out"]
    rows = []
    for row in found["report"]["depths"]:
        asked = row["threshold"] is not None
        decides = [f"{row['fires']:.1%}", f"{row['precision']:.1%}"] if asked else ["not used", ""]
        rows.append([str(row["depth"]), f"{row['agreement']:.1%}", f"{row['bare_agreement']:.1%}", *decides])
    head = [f"depth (of {found['layers']})", "exit agrees", "untrained head", "decides (of all tokens)", "and is then right"]
    note = (
        f"{held['rows']:,} tokens of {held['sequences']} held-out answers; {held['shortlist_coverage']:.1%} of the full model's"
    )
    trained = f"{found['report']['training_tokens']:,} tokens of training."
    return f"{table(head, rows)}\n\n{note} tokens are in the shortlist; {trained}"


def drafter(file: Path = EXITS) -> str:
    """Acceptance of the drafter on held-out text, step by step."""
    found = json.loads(file.read_text())["report"]["drafter"]
    steps = found["agreement_by_step"]
    head = ["step", *(str(step) for step in range(1, len(steps) + 1)), "accepted of 5 in a row"]
    rows = [["agrees", *(f"{share:.1%}" for share in steps), f"{found['accepted_in_a_row']:.2f}"]]
    note = f"{found['positions']:,} held-out tokens; {found['answer_tokens']:,} tokens of training in its last run."
    return f"{table(head, rows)}\n\nA step counts where those before it agreed. {note}"


def inspected(file: str) -> str:
    """What blocks and head cost by the number of rows, and how often the untrained head agrees at each depth."""
    found = load(file)
    cost = found["cost"]
    columns = (cost["rows"], cost["block_seconds"], cost["blocks_seconds"], cost["head_seconds"])
    rows = [
        [str(count), f"{1e3 * block:.2f}", f"{1e3 * blocks:.1f}", f"{1e3 * head:.1f}", f"{head / block:.1f}"]
        for count, block, blocks, head in zip(*columns, strict=True)
    ]
    shares = ", ".join(f"{depth}: {share:.0%}" for depth, share in found["agreement"].items())
    note = f"The untrained head gives full depth's token at depth {shares} ({found['tokens']} tokens)."
    return (
        f"{table(['rows', 'one block, ms', 'all blocks, ms', 'head, ms', 'head in blocks'], rows)}\n\n{note}\n\n{source(file)}."
    )


def auroc(file: str) -> str:
    """AUROC per signal and exit, and what reading it costs."""
    scores: list[Result] = load(file)["scores"]
    depths = sorted({score["depth"] for score in scores})
    found = {(score["signal"], score["depth"]): score for score in scores}
    rows = [["*the exit agrees*", *(f"*{found[scores[0]['signal'], d]['agreement']:.0%}*" for d in depths), ""]]
    for signal in dict.fromkeys(score["signal"] for score in scores):
        mine = [found[signal, depth] for depth in depths]
        values = ["-" if s["auroc"] is None else f"{s['auroc']:.2f}" for s in mine]
        rows.append([signal, *values, f"{median(s['share_of_block'] for s in mine):.0%}"])
    return table(["signal", *(f"depth {d}" for d in depths), "cost, of a block"], rows)


def estimates(file: str) -> str:
    """The fastest setting of each rule, worked out from recorded exits and measured passes."""
    rows = [
        [
            row["rule"],
            ", ".join(map(str, row["stops"])),
            "" if row["chance"] is None else f"{row['chance']:g}",
            str(row["draft_tokens"]),
            f"{row['tokens_per_round']:.2f}",
            f"{row['accepted_share']:.0%}",
            f"{row['ratio']:.2f}",
        ]
        for row in load(file)["estimates"]
    ]
    head = ["rule", "exits", "chance at least", "drafts", "tokens a round", "drafts accepted", "tokens/s of full depth"]
    return f"{table(head, rows)}\n\n{source(file)}."


def audit(file: str) -> str:
    """What ``adi audit`` tried and found, by precision."""
    rows = []
    for engine in load(file)["engines"]:
        runs = [*engine["greedy"], *engine["faults"]]
        worst = max(engine["sampling"], key=lambda s: s["variation"] / s["band"])
        rows.append(
            [
                engine["precision"],
                "yes" if engine["row_invariant"] else "no",
                f"{max(d['drafted'] for r in engine['replay'] for d in r['drifts']):g}",
                f"{sum(sum(r['rollbacks'].values()) for r in engine['replay']):,}",
                f"{sum(run['runs'] for run in runs):,}",
                f"{sum(run['drafted'] for run in runs):,} ({sum(run['accepted'] for run in runs):,})",
                f"{sum(len(run['divergences']) for run in runs):,}",
                f"{sum(s['foreseen'] for s in engine['sampling']):,} of {sum(s['draws'] for s in engine['sampling']):,}",
                f"{worst['variation']:.3f} of {worst['band']:.3f}",
            ]
        )
    head = [
        "precision",
        "rows invariant",
        "replay: largest difference",
        "rollbacks",
        "runs",
        "drafts (accepted)",
        "divergences",
    ]
    return f"{table([*head, 'draws as their seeds say', 'variation, of its band'], rows)}\n\n{source(file)}."


def readme_table() -> str:
    """The five rows of README.md."""
    found = load("ladder.json")
    runs, known = {run["name"]: run for run in found["runs"]}, ratios(found)
    first = next(iter(README_ROWS))
    head = [
        "int8, 2 cores with AVX-512",
        "tokens/s",
        "first token, ms",
        "verified is faster by",
        "same text as full depth",
        "peak MiB",
    ]
    rows = [[label, *cells(runs[name], [known.get((first, name))])] for name, label in README_ROWS.items()]
    note = f"{found['model']}, {found['prompts']} built-in prompts, medians and 95% intervals"
    origin = source("ladder.json").replace("(#machines)", "(docs/benchmarks.md#machines)")
    return f"{table(head, rows)}\n\n{note}; {origin}."


def loops() -> str:
    """The table of docs/loops.md: one column a model."""
    found = [load(path.name) for path in sorted(RESULTS.glob("loops_*.json"))]
    rows = [[label, *map(cell, found)] for label, cell in LOOP_ROWS.items()]
    commands = " and ".join(f"`{each['command']}`" for each in found)
    objectives = load("objectives.json")
    more = "".join(f"\n\n{part}" for each in [*found, objectives] for part in (_compared(each), _prices(each)) if part)
    whole = table(["", *(each["task"] for each in found)], rows)
    return f"{whole}\n\n{commands}; 95% intervals over items.{more}\n\n`{objectives['command']}`"


def habituated() -> str:
    """The tables of docs/habits.md on a workload, before and after; nothing while there are no figures."""
    if not (RESULTS / "habits.json").exists():
        return ""
    found, rows = load("habits.json"), []
    for one in found["results"]:
        sides = {"held-out workload": one["workload"], **one["workload"]["by_category"], "other prompts": one["others"]}
        for name, side in sides.items():
            ratios = [
                _between(r[0], r[1:], ".2f")
                for r in (*(side[w]["ratio"] for w in ("before", "after")), side["after_to_before"])
            ]
            passes = [f"{side[way]['tokens_per_pass']:.2f}" for way in ("before", "after")]
            rows.append([f"{one['precision']}, {name}", str(side["prompts"]), *ratios, *passes, f"{side['same_text']:.0%}"])
    head = [
        "",
        "prompts",
        "before, x full depth",
        "after, x full depth",
        "after / before",
        "tokens a pass, before",
        "after",
        "same text",
    ]
    curve = []
    for row in found["curve"]:
        by_cost, right = _between(row["by_cost"][0], row["by_cost"][1:], ".2f"), row["first_draft_right"]
        curve.append([str(row["prompts"]), f"{row['tokens_per_pass']:.2f}", by_cost, "" if right is None else f"{right:.0%}"])
    repeated = [[str(row["repetition"]), f"{row['tokens_per_pass']:.2f}"] for row in found["repetitions"]]
    split = found["split"]
    note = f"{split['train']} prompts learned from, {split['choosing']} choose, {split['testing']} only tested on"
    parts = [
        f"{table(head, rows)}\n\n{found['model']}, {note}; {origin('habits.json')}.",
        table(["prompts learned from", "tokens a pass", "x full depth by the cost table", "first drafts right"], curve),
        table(["the same prompts, with a history, for the n-th time", "tokens a pass"], repeated),
    ]
    return "\n\n".join(parts)


def sparsity() -> str:
    """The tables of docs/triggers.md on sparse layers; nothing while there are no figures."""
    if not (RESULTS / "sparsity.json").exists():
        return ""
    found, alone, added, together = load("sparsity.json"), [], [], []
    for rule in found["rules"]:
        name, each, gains = rule["rule"], rule["alone"], rule["gains"]
        heads = [f"{each[signal]['auroc']:.2f}" for signal in ("entropy", "top_probability", "gate")]
        signals = [f"{each[signal]['auroc']:.2f} {_signs(each[signal]['high'])}" for signal in SPARSE_SIGNALS]
        alone.append([name, f"{rule['accuracy']:.0%}", f"{rule['active']:.0%}", *heads, *signals])
        of = gains["entropy"]
        added.append([name, *(_between(of[signal]["more"], of[signal]["interval"], "+.3f") for signal in SPARSE_SIGNALS)])
        ahead = [gains[base]["all"]["ahead"] for base in ("entropy", "head and gate")]
        compared = ["" if name == "frozen" else _between(one[0], one[1:], "+.3f") for one in ahead]
        sums = [_between(gain["all"]["more"], gain["all"]["interval"], "+.3f") for gain in gains.values()]
        together.append([name, *sums, *compared])
    names = [*SPARSE_SIGNALS.values()]
    parts = [
        "AUROC of each signal alone, with what sure means by seed (+ high, - low):",
        table(["", "right", "active", "entropy", "top probability", "gate", *names], alone),
        "AUROC that each adds to entropy:",
        table(["", *names], added),
        "AUROC that all four add to more, and how far this is ahead of frozen prototypes:",
        table(["", *(f"to {base}" for base in gains), "ahead, to entropy", "ahead, to head and gate"], together),
        f"{source('sparsity.json').replace('(#', '(benchmarks.md#')}.",
    ]
    return "\n\n".join(parts)


SPARSE_SIGNALS = {
    "active_share": "active share",
    "active_share_at_equal": "at 25% active",
    "route_margin": "route margin",
    "route_jump": "jump",
}


def _signs(high: Sequence[bool]) -> str:
    """What sure means, by seed."""
    return "".join("+" if one else "-" for one in high)


def learned() -> str:
    """The tables of docs/habits.md on a model whose own blocks were trained; nothing while there are no figures."""
    if not (RESULTS / "learned.json").exists():
        return ""
    found = load("learned.json")
    curve = found["curve"]
    depths, first = list(curve[0]["exits"]), curve[0]["perplexity"]
    points = []
    for point in curve:
        agreed = [f"{point['exits'][depth]['full']:.1%}" for depth in depths]
        plain = f"{point['perplexity']:.2f} ({point['perplexity'] / first - 1:+.1%})"
        points.append([f"{point['minutes']:.0f}", str(point["steps"]), *agreed, f"{point['full']:.1%}", plain])
    exits = [f"exit at {depth} agrees" for depth in depths]
    parts = [table(["minutes", "steps", *exits, "full depth says what it said", "perplexity of plain text"], points)]
    if "certified" in found:
        shares = []
        for was, now in zip(found["certified"]["original"], found["certified"]["trained"], strict=True):
            cells = (f"{each['share']:.0%} ({each['observed']:.1%} seen)" for each in (was, now))
            shares.append([f"{was['level']:.0%}", *cells])
        ways = [
            [name, _between(r["ratio"][0], r["ratio"][1:], ".2f"), f"{r['score']:.1%}", f"{r['same_answers']:.0%}"]
            for name, r in found["routes"].items()
        ]
        parts += [
            table(["certified to differ in at most", "mean depth as it was, share of blocks", "trained"], shares),
            table(["", "x full depth as it was", "orders right", "same answers"], ways),
            f"{found['prompts_certified']} fresh prompts for certificates, {found['prompts_tested']} others for the rest.",
        ]
    return "\n\n".join([*parts, f"{found['model']}; {origin('learned.json')}"])


def _compared(found: Result) -> str:
    """Models of the same task on the same items; nothing where there are none."""
    rows = []
    for r in found.get("compared", ()):
        halted = [""] * 4
        if "area" in r:
            halted = [
                f"{r['accuracy_halted']:.2%}",
                f"{r['mean_turns']:.2f}",
                _between(r["area"], r["area_interval"], ".4f"),
                f"{r['ahead_interval'][0]:+.4f} to {r['ahead_interval'][1]:+.4f}",
            ]
        rows.append([Path(r["model"]).name, r["objective"] or "", str(r["turns"]), f"{r['accuracy']:.2%}", *halted])
    columns = ["objective", "turns", "right with all", "right halted", "mean turns", "area", "the first is ahead by"]
    return table([found["task"], *columns], rows) if rows else ""


def _prices(found: Result) -> str:
    """Turns and accuracy over prices; nothing where none were asked."""
    rows = [
        [
            f"{r['price']:g}",
            _between(r["mean_turns"], r["mean_turns_interval"], ".2f"),
            _between(r["accuracy"], r["accuracy_interval"]),
        ]
        for r in found.get("prices", ())
    ]
    return table([f"{found['task']}: price, nats for a full pass", "mean turns", "right"], rows) if rows else ""


def _between(value: float, bounds: Sequence[float], form: str = ".2%") -> str:
    return f"{value:{form}} ({bounds[0]:{form}} to {bounds[1]:{form}})"


LOOP_ROWS: dict[str, Callable[[Result], str]] = {
    "all turns": lambda r: str(r["turns"]),
    "right with all turns": lambda r: _between(r["accuracy_all_turns"], r["accuracy_all_turns_interval"]),
    "right halted by the gate": lambda r: _between(r["accuracy_halted"], r["accuracy_halted_interval"]),
    "mean turns": lambda r: _between(r["mean_turns"], r["mean_turns_interval"], ".2f"),
    "rank correlation of turns with log difficulty": lambda r: f"{r['rank_correlation']:.3f}",
    "turns by difficulty": lambda r: ", ".join(f"{d['from']}-{d['to']}: {d['turns']:.1f}" for d in r["by_difficulty"]),
    "right after each number of turns": lambda r: " ".join(f"{100 * share:.1f}" for share in r["by_turn"]) + " %",
    "random, same turns": lambda r: f"{r['controls']['random_same_turns']:.2%}",
    "oracle": lambda r: f"{r['controls']['oracle_accuracy']:.2%} in {r['controls']['oracle_turns']:.2f} turns",
    "area": lambda r: ", ".join(f"{name} {value:.4f}" for name, value in r["controls"]["area"].items()),
    "the gate's area is ahead by": lambda r: ", ".join(
        f"{name} {low:+.4f} to {high:+.4f}" for name, (low, high) in r["controls"].get("gate_ahead_interval", {}).items()
    ),
    "certified to differ from all turns in at most 2%": lambda r: (
        f"{c['mean_turns']:.2f} turns (threshold {c['threshold']}, {c['observed']:.2%} seen)"
        if (c := r.get("certified")) is not None
        else "none"
    ),
    "faster than all turns in wall-clock time, by batch": lambda r: ", ".join(
        f"{s['batch']} on {s.get('backend', 'hf')}: {s['median']:.2f} x ({s['low']:.2f} to {s['high']:.2f})"
        for s in r.get("speed", ())
    ),
    "milliseconds a batch, halted": lambda r: ", ".join(
        f"{s['batch']} on {s['backend']}: {s['halted_ms']:.2f}" for s in r.get("speed", ()) if "halted_ms" in s
    ),
}


def pages() -> dict[Path, str]:
    """The text of every generated page."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.globals |= {
        **{
            f.__name__: f
            for f in (
                machines,
                bench,
                batches,
                lengths,
                lengths_alone,
                starts,
                then_and_now,
                categories,
                quality,
                exits,
                drafter,
                inspected,
                auroc,
                estimates,
                audit,
            )
        },
        "results": RESULTS,
    }
    readme = ROOT / "README.md"
    text, count = re.subn(
        r"(<!-- table -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{readme_table()}\n{m[2]}", readme.read_text(), flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit("README.md has no place for its table: <!-- table --> ... <!-- end -->")
    template = environment.from_string((ROOT / "tools" / "benchmarks.md.j2").read_text())
    found = {readme: text, ROOT / "docs" / "benchmarks.md": template.render()}
    for page, parts in PARTS.items():
        filled = (ROOT / "docs" / page).read_text()
        for name, make in parts.items():
            filled = re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- end -->)",
                lambda m, make=make: f"{m[1]}{make()}\n{m[2]}",
                filled,
                flags=re.DOTALL,
            )
        found[ROOT / "docs" / page] = filled
    if (RESULTS / "lengths.json").exists():
        found[ROOT / "docs" / "images" / "lengths.svg"] = long_texts.drawing(load("lengths.json"))
    return found | {ROOT / exposure_tables.DRAWING: exposure_tables.drawing(load)}


def served() -> str:
    """Servers under load: medians of the rounds; nothing where that was not measured."""
    if not (RESULTS / "load.json").exists():
        return ""
    found = load("load.json")
    systems = found["systems"]
    names = ("tokens_per_second", "first_median", "first_95", "between_median", "between_95")
    rows = [
        [
            f"{clients} | {system}",
            *(f"{median(one[name] for one in rounds):.{0 if 'tokens' in name else 3}f}" for name in names),
        ]
        for clients in next(iter(systems.values()))
        for system, rounds in ((name, found[clients]) for name, found in systems.items())
    ]
    head = ("clients | system", "tokens/s", "first token, s", "95%", "between tokens, s", "95%")
    again = found.get("asked_again", {}).items()
    two = "; ".join(f"{kind} {found['texts_that_differ'][kind]} of {count}" for kind, count in again)
    note = f"Prompts with two texts, of those asked again in other company: {two}.\n\n" if two else ""
    return f"{table(head, rows).replace('|---|', '|---:|---|', 1)}\n\n{note}{origin('load.json')}"


def soaked() -> str:
    """The soak of the server, by engine; nothing where there was none."""
    if not (RESULTS / "serve_soak.json").exists():
        return ""
    head = ("engine", "requests", "given up", "texts, all as alone", "threads", "files", "own memory, MiB", "processor, s")
    rows = []
    for engine, told in load("serve_soak.json")["engines"].items():
        count, sides = told["requests"], (told["before"], told["after"])
        held = [" to ".join(f"{side[name] / unit:.0f}" for side in sides) for name, unit in HELD.items()]
        kinds = (sum(count.values()), count["given up"], count["the text alone"])
        rows.append([engine, *(f"{number:,}" for number in kinds), *held, f"{told['processor_seconds']:.0f}"])
    return f"{table(head, rows)}\n\n{origin('serve_soak.json')}"


HELD = {"threads": 1, "files": 1, "private_bytes": 2**20}

# What stands between <!-- name --> and <!-- end --> of a page of docs.
PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "loops.md": {"loops": loops},
    "habits.md": {
        "habituate": habituated,
        "learned": learned,
        **{name: functools.partial(make, load, table) for name, make in exposure_tables.MAKE.items()},
    },
    "serving.md": {"served": served, "soaked": soaked},
    "triggers.md": {"sparsity": sparsity},
}


def note_made(files: Sequence[str]) -> None:
    """Note today's date and the commit for results that were measured just now."""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    made = json.loads(MADE.read_text())
    now = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": commit.strip()}
    made |= {Path(file).name: now for file in files}
    MADE.write_text(json.dumps(dict(sorted(made.items())), indent=1) + "\n")


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["--made"]:
        note_made(arguments[1:])
    for page, text in pages().items():
        if "--check" in arguments and (not page.exists() or page.read_text() != text):
            raise SystemExit(f"{page.name} is not current; run: make tables")
        if "--check" not in arguments:
            page.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
