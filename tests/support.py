"""What several test files make or run: a certificate, an interruption, the command line."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

import adi
from adi.cli.app import app
from adi.measure.trigger_study.pass_seconds import PassSeconds
from adi.risk.certificate import Certificate

BARE_AGREEMENT = {16: 0.11, 20: 0.18, 24: 0.39, 28: 0.56}  # the default model's own final head at these depths, untrained
PETS = [{"age": age, "kind": kind} for age in range(3, 41) for kind in ("cat", "dog")]
_FIELDS = {"age": {"type": "integer", "minimum": 3, "maximum": 40}, "kind": {"enum": ["cat", "dog"]}}
_SCHEMA = {"type": "object", "properties": _FIELDS, "required": ["age", "kind"], "additionalProperties": False}
PET: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": _SCHEMA, "strict": True}}  # its texts are PETS


def certificate(**changes: Any) -> Certificate:
    given = Certificate(
        method="ltt",
        kind="disagreement",
        level=0.02,
        delta=0.05,
        trigger=adi.Threshold("top_probability", {2: 0.9}),
        sequences=400,
        max_new_tokens=32,
        observed=0.012,
        mean_depth=5.1,
        nats=None,
        text_hash="abc",
        fingerprint="f",
        precision="fp32",
    )
    return replace(given, **changes)


def pass_seconds(
    layers: int, rows: tuple[int, ...], entry: float, block: tuple[float, ...], head: tuple[float, ...]
) -> PassSeconds:
    """What would be measured where a pass and each of its blocks cost so much, by number of rows."""
    half = max(1, layers // 2)
    whole = tuple(entry + layers * seconds for seconds in block)
    return PassSeconds(layers, rows, tuple(entry / half + seconds for seconds in block), whole, head)


class Stop(Exception):  # noqa: N818
    """Stands for Ctrl-C."""


def adi_(*args: Any, text: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args], input=text)


def invoke(*args: Any) -> Any:
    return CliRunner().invoke(app, ["bench", *(str(a) for a in args)])


class _Thread(threading.Thread):
    """Stands for a process: nothing has to be ended, since its pipe is closed before."""

    def terminate(self) -> None: ...


def bench_in_threads(patch: pytest.MonkeyPatch) -> None:
    """A benchmark's systems answer by the same pipes, from threads: a process would spend seconds on importing torch."""

    def spawned(target: Callable[..., None], *args: Any) -> tuple[Any, Any]:
        ours, theirs = multiprocessing.Pipe()
        thread = _Thread(target=target, args=(theirs, *args), daemon=True)
        thread.start()
        return thread, ours

    patch.setattr("adi.measure.bench.worker._spawned", spawned)


def time_once(patch: pytest.MonkeyPatch) -> None:
    """A study of triggers times everything once: what it times is not what is tested."""
    patch.setattr("adi.measure.trigger_study.study.COST_REPEATS", 1)
    patch.setattr("adi.measure.trigger_study.exit_table.REPEATS", 1)


def embedding(model: adi.Model) -> Any:
    """What enters the first block for some tokens, as a tensor."""
    return lambda ids: model.backbone.embed(ids).hidden_TD
