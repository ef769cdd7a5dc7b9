"""Batches in the benchmark: groups, figures, resuming, and a failure that costs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adi.cli.app import app
from adi.measure.bench.outcomes import BatchPair, Setting
from adi.measure.bench.run import Extent, bench
from adi.measure.bench.summary import batch_entries
from adi.measure.bench.worker import System
from adi.prompts import PromptItem

NAMES = ["adi:full:fp32", "adi:lookup:fp32"]
ITEMS = [PromptItem((f"the dog {i}",), "x") for i in range(5)]


def test_groups_are_whole_and_distinct() -> None:
    assert [list(g) for g in Extent(batch=2).groups([0, 2, 4, 6, 8])] == [[0, 2], [4, 6]]
    assert Extent(batch=3).groups([1, 2]) == Extent().groups([1, 2]) == []


def test_the_figures_are_medians_over_groups_of_paired_speeds() -> None:
    one = System(NAMES[0], Setting("m", None, None, 1, 0))
    assert batch_entries([one], 2, 1, 0) == []
    one.pairs = {
        0: BatchPair(1.0, 20, 2.0, 20, True),
        2: BatchPair(1.0, 30, 3.0, 30, True),
        4: BatchPair(1.0, 40, 8.0, 20, False),
    }
    (entry,) = batch_entries([one], 2, 1, 0)
    assert (entry["name"], entry["batch"], entry["groups"], entry["same"]) == (NAMES[0], 2, 3, False)
    assert (entry["batch_tokens_per_second"], entry["alone_tokens_per_second"]) == (30, 10)
    assert (entry["low"], entry["median"], entry["high"]) == (2, 3, 16)


def test_batches_go_into_the_result_and_resume(tiny_folder: Path, tmp_path: Path) -> None:
    out, setting = tmp_path / "r.json", Setting(str(tiny_folder), None, None, 1, 0)

    def interrupt(done: int, total: int, what: str) -> None:
        if (done, total, what) == (1, 2, "adi:full:fp32 in batches"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(NAMES, ITEMS, setting, Extent(6, batch=2), result=out, progress=interrupt)
    partial = out.with_name("r.json.partial")
    kept = json.loads(partial.read_text())
    assert list(kept["systems"][NAMES[0]]["pairs"]) == ["0"], "one group was finished"
    assert len(kept["systems"][NAMES[0]]["outcomes"]) == len(ITEMS), "and all paired runs"
    assert kept["systems"][NAMES[1]]["pairs"] == {}, "only full depth runs batches"
    kept["systems"][NAMES[0]]["pairs"]["0"]["alone_seconds"] = 1e6
    partial.write_text(json.dumps(kept))
    seen: list[Any] = []
    found = bench(NAMES, ITEMS, setting, Extent(6, batch=2), result=out, progress=lambda *now: seen.append(now))
    assert not [what for _, total, what in seen if total and "in batches" not in what], "no paired run was left"
    (entry,) = found["batches"]
    assert (entry["name"], entry["batch"], entry["groups"], entry["same"], entry["error"]) == (NAMES[0], 2, 2, True, None)
    assert entry["high"] > 1e4, "the first group's figures are those that were kept"
    assert found["batch"] == 2


def test_a_batch_that_fails_is_a_line_of_its_own(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = System.ask
    monkeypatch.setattr(System, "ask", lambda one, what, *given: ask(one, "no such order" if what == "batch" else what, *given))
    found = bench(NAMES[:1], ITEMS[:2], Setting(str(tiny_folder), None, None, 1, 0), Extent(4, batch=2))
    (entry,), (run,) = found["batches"], found["runs"]
    assert entry["groups"] == 0
    assert "no such order" in entry["error"]
    assert run["error"] is None
    assert run["tokens_per_second"] > 0


def test_the_command_prints_a_table(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"the fox number {i}"}) for i in range(4)))
    args = [
        "bench",
        str(tiny_folder),
        "--prompts",
        str(prompts),
        "--modes",
        "full",
        "-n",
        "4",
        "--threads",
        "1",
        "--precision",
        "fp32",
    ]
    done = CliRunner().invoke(app, [*args, "--batch", "2", "--restarts", "2"])
    assert done.exit_code == 0, done.output
    table = done.stdout[done.stdout.index("batch") :]
    assert "adi:full:fp32" in table
    assert "yes" in table
    for given, complaint in (("5", "--batch is 5; it must be at least 2, and at most the 4 prompts"), ("1", "--batch is 1")):
        done = CliRunner().invoke(app, [*args, "--batch", given])
        assert done.exit_code == 2
        assert complaint in " ".join(done.output.split())
    done = CliRunner().invoke(app, [*args, "--modes", "lookup", "--batch", "2"])
    assert done.exit_code == 2
    assert "--batch 2 is measured with full depth" in " ".join(done.output.split())
