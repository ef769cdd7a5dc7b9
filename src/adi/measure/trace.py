"""Trace files: one generation with everything that was looked at, as versioned JSON (docs/trace.md describes it)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from adi.decoding.policies import Policy
from adi.decoding.records import Generation, Step, Summary
from adi.errors import FileError
from adi.exits.triggers import Rule
from adi.files import read_json, write_text
from adi.schema import Natural, Record, from_json

FORMAT, VERSION = "adi-trace", 3
READ = (2, 3)  # version 2 had no free energy
MOST_LAYERS = 1 << 14  # the page draws as many


class Trace(Record, frozen=True):
    """A generation as a trace file holds it. ``depths`` are the exits (0: n-gram match), ``trigger`` their rule (or None)."""

    model: str
    backend: str
    precision: str
    mode: str
    layers: Annotated[int, Meta(ge=1, le=MOST_LAYERS)]
    depths: tuple[Natural, ...]
    trigger: dict[str, Any] | None
    prompt: str
    text: str
    summary: Summary
    steps: tuple[Step, ...]


def trace_of(generation: Generation, policy: Policy, prompt: str) -> Trace:
    """The trace of a finished generation; generate with ``logprobs=5`` or so, or its steps hold no looks."""
    trigger = policy.exit_trigger
    return Trace(
        model=generation.model,
        backend=generation.backend,
        precision=generation.precision,
        mode=generation.mode,
        layers=generation.layers,
        depths=policy.depths,
        trigger=None if trigger is None else trigger.to_json(),
        prompt=prompt,
        text=generation.text,
        summary=generation.summary(),
        steps=generation.steps,
    )


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace file, whole or not at all."""
    value = {"format": FORMAT, "version": VERSION, **trace.to_json()}
    write_text(Path(path), json.dumps(rounded(value, drop=True), ensure_ascii=False) + "\n")


def rounded(value: Any, *, drop: bool = False) -> Any:
    """Numbers to six significant digits: a third of the bytes, and nothing that anyone could see. Those that JSON has no name
    for become None, or with ``drop`` are left out of their mapping."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        found = {str(key): rounded(member, drop=drop) for key, member in value.items()}
        return {key: member for key, member in found.items() if not drop or member is not None or value[key] is None}
    return [rounded(member, drop=drop) for member in value] if isinstance(value, (list, tuple)) else value


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace file; AdiError says what is wrong with one that is damaged, too large, or of another version."""
    value = read_json(Path(path), "trace")
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
        raise FileError(f"{path} is not a trace file (adi trace PROMPT --out FILE makes one).")
    if (version := value.pop("version", None)) not in READ:
        raise FileError(f"{path} is a trace of version {version!r:.60}; this adi reads versions {READ[0]} to {VERSION}.")
    trace = from_json(value, Trace, f"the trace {path} is damaged")
    if trace.trigger is not None:
        from_json(trace.trigger, Rule, f"the trigger in the trace {path} is damaged")
    depths = [*trace.depths, *(step.depth for step in trace.steps)]
    for step in trace.steps:
        depths += [look.depth for look in step.looks] + [draft.depth for draft in step.rejected]
    if max(depths, default=0) > trace.layers:
        raise FileError(f"the trace {path} is damaged: depth {max(depths)} is outside a model of {trace.layers} layers.")
    return trace
