"""Trace files: one generation with everything that was looked at, as versioned JSON (docs/trace.md describes it)."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from adi.decoding.policies import FullDepth, Lookup, Policy, depths_of, trigger_of
from adi.decoding.records import Generation, Step, Summary
from adi.errors import AdiError
from adi.exits.triggers import trigger_from_json
from adi.files import read_json, write_text

FORMAT, VERSION = "adi-trace", 1
MAX_BYTES = 256 * 2**20
MOST_LAYERS = 1 << 14  # the page draws as many


@dataclass(frozen=True)
class Trace:
    """A generation as a trace file holds it. ``depths`` are the exits (0: memory), ``trigger`` their rule (or None)."""

    model: str
    backend: str
    precision: str
    mode: str
    layers: int
    depths: tuple[int, ...]
    trigger: dict[str, Any] | None
    prompt: str
    text: str
    summary: dict[str, Any]
    steps: tuple[Step, ...]


def trace_of(generation: Generation, policy: Policy | None, prompt: str) -> Trace:
    """The trace of a finished generation; generate with ``candidates=5`` or so, or its steps hold no looks."""
    policy = policy if policy is not None else FullDepth()
    return Trace(
        model=generation.model,
        backend=generation.backend,
        precision=generation.precision,
        mode=generation.mode,
        layers=generation.layers,
        depths=depths_of(policy),
        trigger=None if isinstance(policy, (FullDepth, Lookup)) else trigger_of(policy).to_json(),
        prompt=prompt,
        text=generation.text,
        summary=generation.summary().to_json(),
        steps=generation.steps,
    )


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace file, whole or not at all."""
    values = {f.name: getattr(trace, f.name) for f in fields(trace)}
    values |= {"depths": list(trace.depths), "steps": [step.to_json() for step in trace.steps]}
    write_text(Path(path), json.dumps(_rounded({"format": FORMAT, "version": VERSION, **values}), ensure_ascii=False) + "\n")


def _rounded(value: Any) -> Any:
    """Numbers to six significant digits: a third of the bytes, and nothing that anyone could see."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        finite = {k: v for k, v in value.items() if not isinstance(v, float) or math.isfinite(v)}  # JSON has no NaN
        return {k: _rounded(v) for k, v in finite.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace file; ValueError says what is wrong with one that is damaged, too large, or of another version."""
    path = Path(path)
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise AdiError(f"the trace {path} has more than {MAX_BYTES >> 20} MiB; that is no trace that adi wrote.")
    value = read_json(path, "trace")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise AdiError(f"{path} is not a trace file (adi trace PROMPT --out FILE makes one).")
    if value.get("version") != VERSION:
        raise AdiError(f"{path} is a trace of version {value.get('version')!r}; this adi reads version {VERSION}.")
    try:
        return _parse({k: v for k, v in value.items() if k not in ("format", "version")})
    except (ValueError, RecursionError) as error:
        raise AdiError(f"the trace {path} is damaged: {error}") from None


def _parse(value: dict[str, Any]) -> Trace:
    names = {f.name for f in fields(Trace)}
    if set(value) != names:
        raise AdiError(f"fields missing or unknown: {sorted(set(value) ^ names)}.")
    for name in ("model", "backend", "precision", "mode", "prompt", "text"):
        if not isinstance(value[name], str):
            raise AdiError(f"{name} is not a text.")
    depths = value["depths"]
    if not isinstance(depths, list) or not all(type(d) is int for d in depths):
        raise AdiError("depths is not a list of whole numbers.")
    layers = value["layers"]
    if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
        raise AdiError(f"layers is not a whole number from 1 to {MOST_LAYERS}.")
    if value["trigger"] is not None:
        trigger_from_json(value["trigger"])
    Summary.from_json(value["summary"])
    if not isinstance(value["steps"], list):
        raise AdiError("steps is not a list.")
    steps = tuple(Step.from_json(step) for step in value["steps"])
    looked = [look.depth for step in steps for look in step.looks]
    drafted = [draft.depth for step in steps for draft in step.rejected]
    if not all(0 <= depth <= layers for depth in (*depths, *looked, *drafted, *(step.depth for step in steps))):
        raise AdiError(f"a depth is outside a model of {layers} layers.")
    return Trace(**{**value, "depths": tuple(depths), "steps": steps})
