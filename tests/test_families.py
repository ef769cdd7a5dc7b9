"""The table of families: of all that transformers has, as generated, and some of it tried again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location("families_tool", TOOLS / "families.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


@pytest.fixture(scope="module")
def known(tool: Any) -> dict[str, Any]:
    return json.loads(tool.RESULTS.read_text())  # type: ignore[no-any-return]


def test_the_page_is_what_the_results_say(tool: Any, known: dict[str, Any]) -> None:
    assert tool.PAGE.read_text() == tool.page(known), "python tools/families.py --table"


def test_the_readme_counts_the_same(tool: Any, known: dict[str, Any]) -> None:
    exact = [
        sum(known[family].get(engine, {}).get("result") == "exact" for family in tool.FAMILIES) for engine in ("hf", "compiled")
    ]
    said = " ".join((TOOLS.parent / "README.md").read_text().split())
    assert f"{exact[0]} of the {len(tool.FAMILIES)} causal families" in said
    assert f"{exact[1]} compiled in fp32" in said


def test_every_family_is_exact_or_has_a_reason_in_words(tool: Any, known: dict[str, Any]) -> None:
    lines = [line.strip("| ").split(" | ") for line in tool.page(known).splitlines() if " | " in line]
    for column, least in ((2, 165), (4, 100)):
        rows = {line[0]: line[column] for line in lines}
        assert set(tool.TRIED) <= rows.keys(), "python tools/families.py tries what is new"
        for family in tool.TRIED:
            result, _, reason = rows[family].partition(": ")
            known_why = result.startswith("exact") or "the same reason" in result
            assert known_why or (result in ("refused", "not tried") and len(reason) > 20), family
            assert "Error" not in reason, "in our own words"
        assert sum(rows[family].startswith("exact") for family in tool.FAMILIES) >= least


@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h", "deepseek_v4", "gemma4_text", "mistral"])
def test_what_the_table_says_of_a_family_is_so(tool: Any, known: dict[str, Any], family: str) -> None:
    entry = tool.measured(family, "hf")
    assert {name: entry[name] for name in ("result", "memory")} == {"result": "exact", "memory": known[family]["hf"]["memory"]}


def test_models_are_found_by_the_names_that_people_know(tool: Any) -> None:
    assert {family for families in tool.NAMES.values() for family in families} <= tool.TRIED.keys()


def test_what_hides_in_zeros_is_drawn(tool: Any) -> None:
    state = tool.tiny("gpt2").state_dict()
    assert all(kept.any() for name, kept in state.items() if name.endswith("bias"))
    assert all((kept != 1).any() for name, kept in state.items() if ".ln_1.weight" in name)


def test_what_is_refused_is_refused_in_a_sentence(tool: Any) -> None:
    entry = tool.measured("minimax", "hf")
    assert entry["result"] == "refused"
    assert entry["reason"].startswith("MiniMaxForCausalLM cannot be split between blocks: ")
