"""Where size, length and load stood and stand (docs/benchmarks.md): figures of 2026-11-29 beside those of the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

GB, MANY = 1e-9, (1, 2, 4, 8, 16, 32)
Result = dict[str, Any]
Figures = tuple[str, str]  # adi's and OpenVINO GenAI's


def then_and_now(results: Path, load: Callable[[str], Result], table: Callable[..., str]) -> str:
    """The table; a cell is empty where its file is not there."""
    found = {name: load(f"{name}.json") if (results / f"{name}.json").exists() else {} for name in SOURCES}
    rows = [[what, *then, *now(found)] for what, then, now in ROWS]
    return table(["int4 where not named", "then", "GenAI then", "now", "GenAI now"], rows)


def _export(found: dict[str, Result]) -> Figures:
    one = found["starts_1b"].get("export")
    return (f"{GB * one['peak_bytes']:.1f} GB for {GB * one['checkpoint_bytes']:.1f} GB" if one else "", "")


def _decoding(found: dict[str, Result]) -> Figures:
    rows = {row["system"]: row for row in found["starts_1b"].get("rows", ())}
    full, verified, peer = (rows.get(name) for name in ("adi:full:int8", "adi:verified:int8", "openvino-genai:int8"))
    own = [full and full["loaded_bytes"], full and full["resident_bytes"], verified and verified["resident_bytes"]]
    return _listed([GB * one for one in own if one], ".1f", " GB"), _listed(
        [GB * peer["resident_bytes"]] if peer else [], ".1f", " GB"
    )


def _first_call(found: dict[str, Result]) -> Figures:
    rows = [row for row in found["starts_1b"].get("rows", ()) if row["system"].startswith("adi:")]
    return _listed([row["first_call"][0] for row in rows], ".2f", " x the second"), ""


def _batches(mode: str, precision: str = "int4") -> Callable[[dict[str, Result]], Figures]:
    def cells(found: dict[str, Result]) -> Figures:
        ran = {(b["name"], b["batch"]): b["tokens_per_second"] for b in found["batch"].get("batches", ()) if b["error"] is None}
        names = (f"adi:{mode}:{precision}", f"openvino-genai:{precision}")
        own, peer = (_listed([ran[name, size] for size in MANY if (name, size) in ran], ".0f") for name in names)
        return own, peer if mode == "full" else ""

    return cells


def _lengths(
    read: Callable[[Result], float], form: str, unit: str, least: int = 0, name: str = "adi:full:int4"
) -> Callable[[dict[str, Result]], Figures]:
    def cells(found: dict[str, Result]) -> Figures:
        rows = [row for row in found["lengths"].get("rows", ()) if row["runs"] and row["positions"] >= least]
        own, peer = (
            _listed([read(r) for r in rows if r["system"] == one], form, unit) for one in (name, "openvino-genai:int4")
        )
        return own, peer

    return cells


def _again(found: dict[str, Result]) -> Figures:
    rows = found["starts"].get("again", ())
    own, peer = (
        _listed([row["seconds"][1] for row in rows if row["system"].startswith(kind)], ".3f", " s")
        for kind in ("adi:", "openvino-genai:")
    )
    return own, peer


def _listed(values: Sequence[float], form: str, unit: str = "") -> str:
    return " / ".join(f"{value:{form}}" for value in values) + unit * bool(values)


PREFILL = partial(_lengths, lambda row: float(row["prefill_seconds"]), ".1f", " s")
DECODING = partial(_lengths, lambda row: 1e3 / float(row["token_ms"]), ".0f", "", 4000)
AS_GENAI, IN_BFLOAT16 = "adi:full:int4-bf16:kv-int8", "the same, `int4-bf16` with 8-bit KV memory, GenAI's own defaults"
SOURCES = ("starts", "starts_1b", "batch", "lengths")
ROWS: tuple[tuple[str, Figures, Callable[[dict[str, Result]], Figures]], ...] = (
    ("1.24 B random weights, int8: making the export", ("12.2 GB for 2.4 GB", ""), _export),
    ("the same, resident: loaded / full depth / verified", ("2.0 / 3.9 / 6.7 GB", ""), _decoding),
    ("the same, first call: full depth / verified", ("verified 101 s, full depth 11 s", ""), _first_call),
    (
        "tokens/s of 1, 2, 4, 8, 16, 32 texts, full depth",
        ("104 / 177 / 244 / 337 / 406 / 610", "102 / 171 / 274 / 353 / 460 / 648"),
        _batches("full"),
    ),
    ("the same, verified", ("201 / 203 / 192 / 242 / 293 / 355", ""), _batches("verified")),
    ("the same in int8, full depth", ("", ""), _batches("full", "int8")),
    ("the same in int8, verified", ("", ""), _batches("verified", "int8")),
    (
        "first token of 1,000 / 4,000 / 7,900 tokens",
        ("0.8 to 1.8 / 5.3 / 21 s", "0.6 to 1.4 / 3.2 / 12 s"),
        PREFILL(),
    ),
    (IN_BFLOAT16, ("", ""), PREFILL(name=AS_GENAI)),
    ("the same prompt of 1,000 / 4,000 tokens again", ("0.8 / 5.2 s", "0.06 / 0.02 s"), _again),
    ("tokens/s after 4,000 / 7,900 tokens, full depth", ("55 to 58 / 24", "54 to 63 / 29"), DECODING()),
    (IN_BFLOAT16, ("", ""), DECODING(name=AS_GENAI)),
)
