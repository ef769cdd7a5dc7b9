"""The load test of ``tools/load.py``, on a tiny model: figures, the same text under every load, loopback only."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import adi
from serving import serving

TOOL = Path(__file__).parent.parent.parent / "tools" / "load.py"


@pytest.fixture
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("load", TOOL)
    assert spec is not None
    assert spec.loader is not None
    made = sys.modules["load"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_figures_of_a_server_that_runs(
    tool: Any, tiny_model: adi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "load.json"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in ("the dog", "12 plus 30", "lazy")))
    with serving(tiny_model, adi.Lookup(), most=4) as running:
        given = ["--systems", f"adi={running.url}", "--clients", "1,6", "--requests", "6", "--rounds", "1", "--tokens", "12"]
        monkeypatch.setattr(
            sys, "argv", ["load.py", "tiny", *given, "--prompts", str(prompts), "--limit", "3", "--json", str(out)]
        )
        tool.main()
    found = json.loads(out.read_text())
    assert found["texts_that_differ"] == {"adi": 0}
    assert found["asked_again"] == {"adi": 6}
    for clients in ("1", "6"):
        (told,) = found["systems"]["adi"][clients]
        assert (told["requests"], told["refused"]) == (6, 0)
        assert 6 <= told["tokens"] <= 72
        assert 0 < told["first_median"] <= told["first_95"]
        assert 0 < told["between_median"] <= told["between_95"]


def test_load_is_sent_to_this_machine_alone(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["load.py", "tiny", "--systems", "adi=http://192.0.2.1:80"])
    with pytest.raises(SystemExit, match="loopback"):
        tool.main()
    monkeypatch.setattr(sys, "argv", ["load.py", "tiny", "--clients", "100"])
    with pytest.raises(SystemExit, match="64 clients"):
        tool.main()
