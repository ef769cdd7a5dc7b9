"""Long texts: ``python tools/lengths.py smollm2-135m --json docs/results/lengths.json``, some nine minutes on two cores.

Each system runs in a process of its own; at each length the systems take turns (``--rounds``) on the same token ids, the
built-in prompts one after the other. Told are medians of the time to the first token (prefill), of milliseconds a token after
it, and the resident memory of the process then. Let nothing else run meanwhile. ``--check FILE`` only says whether adi is at
least 0.95 x as fast as GenAI of the same precision everywhere (exit code 1 where it is not).

Systems: ``adi:MODE:PRECISION``, with ``:kv-int8`` behind it for keys and values in 8 bits, and the peers of ``adi bench``.
GenAI computes in bfloat16 and keeps keys and values in 8 bits by default where the processor can: ``int8-bf16:kv-int8``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from adi.files import write_json
from adi.measure.bench.outcomes import Setting, Task
from adi.measure.bench.shapes import SHAPES, shaped
from adi.measure.bench.systems import adi_model
from adi.measure.bench.worker import System, prepare
from adi.measure.provenance import provenance
from adi.prompts import read_prompts

KV_INT8 = ":kv-int8"
SYSTEMS = tuple(
    name
    for weights in ("int4", "int8")
    for name in (f"adi:full:{weights}", f"adi:full:{weights}-bf16{KV_INT8}", f"openvino-genai:{weights}")
)
PEER = "openvino-genai"
LEAST = 0.95
COLOURS = ("#1f62b0", "#a2323a", "#4c8c4a", "#c98a1b", "#7a4fa3", "#555555", "#00868b")


@dataclass(frozen=True)
class Measured:
    """One generation: seconds to the first token, milliseconds a token after it, and the process's memory then."""

    prefill: float
    token_ms: float
    resident: int


def started(name: str, setting: Setting) -> System:
    """The system in a process of its own, loading."""
    plain = name.removesuffix(KV_INT8)
    system = System(plain, replace(setting, kv_precision="int8") if plain != name else setting)
    system.start()
    return system


def once(system: System, ids: tuple[int, ...], tokens: int) -> Measured | None:
    outcome = system.run(Task(ids, tokens, frozenset()))
    if outcome is None or len(outcome.token_ids) < 2:
        return None
    rest = (outcome.seconds - outcome.ttft_seconds) / (len(outcome.token_ids) - 1)
    return Measured(outcome.ttft_seconds, 1e3 * rest, system.resident_bytes)


def measure(model: str, names: list[str], lengths: list[int], tokens: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each system and length, in this order."""
    setting = Setting(model, None, None, threads, 0, context=max(lengths) + tokens)
    prepare([name.removesuffix(KV_INT8) for name in names], setting)
    text = "\n\n".join(item.prompt for item in (*read_prompts("bench"), *read_prompts("train")))
    ids = adi_model("auto", setting).encode(text, raw=True)
    if len(ids) < max(lengths):
        ids *= -(-max(lengths) // len(ids))
    systems = {name: started(name, setting) for name in names}
    rows = []
    for length in lengths:
        found: dict[str, list[Measured]] = {name: [] for name in names}
        for turn in range(0 if length == lengths[0] else 1, rounds + 1):  # the very first is a warm-up
            for name, system in systems.items():
                if system.ready() if turn == 0 else system.error is None:
                    one = once(system, tuple(ids[:length]), tokens)
                    found[name] += [one] if one is not None and turn else []
                    print(name, length, one or system.error, file=sys.stderr, flush=True)
        rows += [_row(name, length, found[name], systems[name].error) for name in names]
    for system in systems.values():
        system.stop()
    return rows


def _row(name: str, length: int, found: list[Measured], error: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"system": name, "positions": length, "error": error, "runs": len(found)}
    if found:
        row["prefill_seconds"] = median(one.prefill for one in found)
        row["token_ms"] = median(one.token_ms for one in found)
        row["resident_bytes"] = found[-1].resident
    return row


def behind(rows: list[dict[str, Any]]) -> list[str]:
    """Where adi is slower than ``LEAST`` x the peer of the same precision, a sentence each."""
    told = []
    known = {(row["system"], row["positions"]): row for row in rows if row["runs"]}
    for (name, length), row in known.items():
        weights = name.removesuffix(KV_INT8).rsplit(":", 1)[-1].removesuffix("-bf16")
        peer = known.get((f"{PEER}:{weights}", length)) if name.startswith("adi:full") else None
        for what in ("prefill_seconds", "token_ms"):
            if peer and peer[what] < LEAST * row[what]:
                told.append(f"{name} at {length}: {what} {row[what]:.3g}, GenAI {peer[what]:.3g}")
    return told


def lengths_table(found: dict[str, Any]) -> str:
    """A Markdown table: a row for each system, columns by length."""
    rows = {(row["system"], row["positions"]): row for row in found["rows"] if row["runs"]}
    lengths = sorted({length for _, length in rows})
    names = list(dict.fromkeys(name for name, _ in rows))
    head = ["", *(f"first token, {n:,}" for n in lengths), *(f"ms a token, {n:,}" for n in lengths), "resident, MB"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name in names:
        mine = [rows[name, n] for n in lengths if (name, n) in rows]
        figures = [*(f"{row['prefill_seconds']:.2f} s" for row in mine), *(f"{row['token_ms']:.1f}" for row in mine)]
        lines.append("| " + " | ".join([f"`{name}`", *figures, f"{mine[-1]['resident_bytes'] / 1e6:.0f}"]) + " |")
    return "\n".join(lines)


def drawing(found: dict[str, Any]) -> str:
    """Memory, prefill a position and time a token over the length, as an SVG image."""
    panels = (
        ("resident memory, MB", "resident_bytes", 1e-6),
        ("prefill, ms a position", "", 1e3),
        ("decoding, ms a token", "token_ms", 1),
    )
    rows = [row for row in found["rows"] if row["runs"]]
    names, most = list(dict.fromkeys(row["system"] for row in rows)), max(row["positions"] for row in rows)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 330" font-family="sans-serif" font-size="11">']
    for i, (title, key, scale) in enumerate(panels):
        value = {id(row): scale * (row[key] if key else row["prefill_seconds"] / row["positions"]) for row in rows}
        left, top = 45 + 250 * i, max(value.values())
        parts.append(f'<text x="{left}" y="14">{title}</text>')
        parts.append(f'<path d="M{left} 25V225H{left + 190}" fill="none" stroke="#888"/>')
        parts += [f'<text x="{left - 4}" y="{y}" text-anchor="end">{v:.3g}</text>' for y, v in ((30, top), (228, 0))]
        parts += [f'<text x="{left + 190}" y="240" text-anchor="end">{most:,} positions</text>']
        for name, colour in zip(names, COLOURS, strict=False):
            dots = [(left + 190 * r["positions"] / most, 225 - 195 * value[id(r)] / top) for r in rows if r["system"] == name]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        parts.append(f'<text x="{45 + 250 * (i % 3)}" y="{265 + 16 * (i // 3)}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    about = argparse.ArgumentParser(description="Prefill, decoding and memory by length, beside GenAI.")
    about.add_argument("model", nargs="?", default="smollm2-135m")
    about.add_argument("--systems", default=",".join(SYSTEMS))
    about.add_argument("--lengths", default="1024,4096,7900")
    about.add_argument("--tokens", type=int, default=33)
    about.add_argument("--rounds", type=int, default=3)
    about.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    about.add_argument("--json", type=Path)
    about.add_argument("--check", type=Path)
    given = about.parse_args()
    if given.check is not None:
        told = behind(json.loads(given.check.read_text())["rows"])
        print("\n".join(told) or f"adi is at least {LEAST} x as fast everywhere")
        raise SystemExit(bool(told))
    lengths = [int(n) for n in given.lengths.split(",")]
    model = str(shaped(given.model)) if given.model in SHAPES else given.model
    rows = measure(model, given.systems.split(","), lengths, given.tokens, given.rounds, given.threads)
    command = "python " + shlex.join(sys.argv)
    found = {"format": "adi-lengths", "version": 1, **provenance(command, read_prompts("bench")), "rows": rows}
    if given.json is not None:
        write_json(given.json, found)
    print(lengths_table(found))
    print("\n".join(behind(rows)))


if __name__ == "__main__":
    main()
