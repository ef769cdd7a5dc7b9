"""``tools/lengths.py`` on scripted systems: who is asked for what, in turn; its table, picture and verdict."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from adi.measure.bench.outcomes import Outcome, Setting, Task

TOOL = Path(__file__).parent.parent.parent / "tools" / "lengths.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lengths", TOOL)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["lengths"] = made
    spec.loader.exec_module(made)
    return made


class Scripted:
    """A system whose prefill takes a millisecond a position, and each token after it a second."""

    def __init__(self, name: str, asked: list[Any]) -> None:
        self.name, self.asked, self.resident_bytes = name, asked, 5_000_000
        self.error = "its process died" if name == "openvino-genai:int4" else None

    def ready(self) -> bool:
        return self.error is None

    def run(self, task: Task) -> Outcome:
        self.asked.append((self.name, len(task.token_ids)))
        first = len(task.token_ids) / 1e3
        return Outcome((1,) * task.max_new_tokens, first + task.max_new_tokens - 1, first)

    def stop(self) -> None:
        self.asked.append((self.name, "stopped"))


def test_systems_take_turns_at_each_length_and_one_that_fails_is_a_line(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(tool, "started", lambda name, setting: Scripted(name, asked))
    monkeypatch.setattr(tool, "prepare", lambda names, setting: None)
    monkeypatch.setattr(tool, "adi_model", lambda *a, **b: SimpleNamespace(encode=lambda *a, **b: (1, 2, 3)))
    names = ["adi:full:int4", "openvino-genai:int4", "adi:full:int8:kv-int8"]
    rows = tool.measure("m", names, [4, 8], 3, 2, 1)
    pair = ["adi:full:int4", "adi:full:int8:kv-int8"]
    assert asked[:10] == [(name, n) for n, rounds in ((4, 3), (8, 2)) for _ in range(rounds) for name in pair], "one warms up"
    assert asked[10:] == [(name, "stopped") for name in names]
    assert [(row["positions"], row["runs"]) for row in rows] == [(4, 2), (4, 0), (4, 2), (8, 2), (8, 0), (8, 2)]
    assert (rows[0]["prefill_seconds"], rows[0]["token_ms"]) == (0.004, 1e3)
    assert "`adi:full:int4` | 0.00 s | 0.01 s | 1000.0 | 1000.0 | 5 |" in tool.lengths_table({"rows": rows})
    assert tool.drawing({"rows": rows}).count("<polyline") == 6


def test_keys_and_values_in_8_bits_are_a_system_of_their_own(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool.System, "start", lambda self: None)
    setting = Setting("m", None, None, 1, 0)
    made = [tool.started(name, setting) for name in ("adi:full:int8", "adi:full:int8:kv-int8")]
    assert [(system.name, system.setting.kv_precision) for system in made] == [
        ("adi:full:int8", "auto"),
        ("adi:full:int8", "int8"),
    ]


def test_slower_than_genai_is_said_where_it_is(tool: ModuleType) -> None:
    def row(name: str, prefill: float, token: float) -> dict[str, Any]:
        return {"system": name, "positions": 9, "runs": 1, "prefill_seconds": prefill, "token_ms": token}

    rows = [row("adi:full:int4", 1.04, 30), row("openvino-genai:int4", 1, 20), row("adi:full:int8", 3, 3)]
    assert tool.behind(rows) == ["adi:full:int4 at 9: token_ms 30, GenAI 20"]
