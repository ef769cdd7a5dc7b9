"""Trace files: they come back as they were, to six digits; anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import adi
from adi.measure.trace import Trace


@pytest.fixture(scope="module")
def trace(tiny_model: adi.Model) -> Trace:
    policy = adi.Verified(adi.bare_exits(tiny_model, (2, 4)), adi.Threshold("top_probability", 0.0))
    generation = adi.generate(tiny_model, "hello", policy, max_new_tokens=12, logprobs=3, stop_at_eos=False)
    return adi.trace_of(generation, policy, "hello")


def test_a_trace_comes_back(trace: Trace, tmp_path: Path) -> None:
    adi.write_trace(trace, tmp_path / "t.json")
    again = adi.read_trace(tmp_path / "t.json")
    assert (again.depths, again.trigger, again.mode, again.text) == (trace.depths, trace.trigger, "verified", trace.text)
    assert [s.token for s in again.steps] == [s.token for s in trace.steps]
    for a, b in zip(again.steps, trace.steps, strict=True):
        for look_a, look_b in zip(a.looks, b.looks, strict=True):
            assert look_a.signals == pytest.approx(look_b.signals, rel=1e-5)
    adi.write_trace(again, tmp_path / "u.json")
    assert (tmp_path / "u.json").read_bytes() == (tmp_path / "t.json").read_bytes()


def test_a_trace_is_strict_json_even_with_nan_in_it(trace: Trace, tmp_path: Path) -> None:
    odd = replace(trace.steps[0], signals={"entropy": float("nan"), "margin": 0.5})
    adi.write_trace(replace(trace, steps=(odd,)), tmp_path / "t.json")
    json.loads((tmp_path / "t.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert adi.read_trace(tmp_path / "t.json").steps[0].signals == {"margin": 0.5}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "other"}, "not a trace file"),
        ({"version": 1}, "version 1"),
        ({"extra": 1}, "extra"),
        ({"model": 3}, "model"),
        ({"layers": "6"}, "layers"),
        ({"depths": [1.5]}, "depths"),
        ({"summary": {}}, "summary"),
        ({"steps": {}}, "steps"),
        ({"steps": [{}]}, r"steps\[0\]: object missing required field"),
        ({"trigger": 3}, "trigger"),
    ],
)
def test_anything_else_is_refused(trace: Trace, tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "t.json"
    adi.write_trace(trace, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=complaint):
        adi.read_trace(path)


def test_missing_and_truncated_files_are_refused(trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the trace"):
        adi.read_trace(tmp_path / "none.json")
    path = tmp_path / "t.json"
    adi.write_trace(trace, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged"):
        adi.read_trace(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="damaged"):
        adi.read_trace(path)
