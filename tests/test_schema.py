"""JSON read by a schema: the value, or a sentence that names file, field, what is expected and what is there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adi.errors import FileError
from adi.schema import Int, NonNegative, Record, Share, from_json, read_json_as
from damage import VALUES, changed, nested, only_value_errors


class Inner(Record, frozen=True):
    name: str
    at: Mapping[int, Share]


class Outer(Record, frozen=True):
    count: Int
    size: NonNegative
    parts: tuple[Inner, ...]
    note: str | None = None


WHOLE = Outer(1, 0.5, (Inner("a", {2: 0.5}), Inner("b", {})), "n")


def test_a_value_goes_to_json_and_back(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps(WHOLE.to_json()))
    assert read_json_as(path, Outer, "thing") == WHOLE


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"count": "1"}, r"count: expected int, got str \('1'\)"),
        ({"count": True}, r"count: expected int, got bool \(True\)"),
        ({"count": 1 << 70}, "count: expected int <= "),
        ({"size": math.nan}, r"size: .* \(nan\)"),
        ({"size": 10**400}, "size: number out of range"),
        ({"more": 1}, "object contains unknown field more"),
        ({"parts": [{"name": "a", "at": {}}, {"name": "a"}]}, r"parts\[1\]: object missing required field at"),
        ({"parts": [{"name": "a", "at": {"2": 2}}]}, r"parts\[0\].at\[...\]: expected float <= 1"),
        ({"parts": [{"name": "a", "at": {"x": 1}}]}, r"parts\[0\].at: expected int, got str"),
        ({"parts": [{"name": 3, "at": {}}]}, r"parts\[0\].name: expected str, got int \(3\)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps({**WHOLE.to_json(), **change}))
    with pytest.raises(FileError, match=rf"the thing .*f\.json is damaged: {complaint}"):
        read_json_as(path, Outer, "thing")


def test_what_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(nested())
    with pytest.raises(FileError, match="nested too deeply"):
        read_json_as(tmp_path / "f.json", Outer, "thing")


@given(st.one_of(VALUES, changed(WHOLE.to_json())))
def test_anything_is_read_or_refused_in_a_sentence(value: Any) -> None:
    found = only_value_errors(lambda: from_json(value, Outer, "this thing"))
    assert found is None or isinstance(found, Outer)
