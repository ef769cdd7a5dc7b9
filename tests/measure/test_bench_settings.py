"""Settings of a benchmark: room for answers, certified levels, and files that changed under the same name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import adi
from adi.measure.bench.outcomes import Outcome, Setting, Task
from adi.measure.bench.run import Extent, bench
from adi.measure.bench.worker import System
from adi.measure.provenance import files_hash
from adi.prompts import PromptItem
from conftest import random_exits
from support import bench_in_threads, certificate, invoke


def test_a_prompt_without_room_for_its_answer_is_refused_before_any_is_run(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_in_threads(monkeypatch)
    long = tmp_path / "p.jsonl"
    long.write_text("\n".join(json.dumps({"prompt": text, "category": "c"}) for text in ("the fox", "the fox " * 3000)))
    done = invoke(tiny_folder, "--prompts", long, "--modes", "full", "-n", 6)
    assert done.exit_code == 2, done.output
    assert "prompt 2 has" in " ".join(done.output.split())


def test_reflex_runs_at_a_certified_level(
    tiny_model: adi.Model, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_in_threads(monkeypatch)
    mine = certificate(fingerprint=tiny_model.backbone.spec.fingerprint)
    replace(random_exits(tiny_model, (2, 4), adi.Never()), certificates=(mine,)).save(tmp_path / "exits")
    setting = Setting(str(tiny_folder), str(tmp_path / "exits"), None, 1, 0, "hf", risk=0.02)
    found = bench(["adi:full:fp32", "adi:reflex:fp32"], [PromptItem(("the dog",), "x")], setting, Extent(4))
    assert [run["error"] for run in found["runs"]] == [None, None]


def test_other_exits_under_the_same_name_are_another_benchmark(tmp_path: Path) -> None:
    (tmp_path / "exits.json").write_text("{}")
    before = files_hash(tmp_path, Path("tiny"))
    assert files_hash(tmp_path, Path("tiny")) == before
    (tmp_path / "exits.json").write_text("{ }")
    assert files_hash(tmp_path, Path("tiny")) != before


def test_an_answer_without_a_token_is_an_error_and_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    one = System("hf:fp32", Setting("m", None, None, 1, 0))
    monkeypatch.setattr(one, "ask", lambda what, *_: Outcome((), 1.0, 0.5) if what == "run" else 0)
    assert one.run(Task((1,), 4, frozenset())) is None
    assert one.error == "it gave no token"
