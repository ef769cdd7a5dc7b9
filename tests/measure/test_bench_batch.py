"""Batches in the benchmark: groups, figures, resuming, and a failure that costs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adi.cli.app import app
from adi.measure.bench.outcomes import BatchOutcome, Outcome, Setting
from adi.measure.bench.run import Extent, bench
from adi.measure.bench.summary import batch_entries
from adi.measure.bench.worker import System
from adi.prompts import PromptItem
from support import bench_in_threads

NAMES = ["adi:full:fp32", "adi:lookup:fp32"]
ITEMS = [PromptItem((f"the dog {i}",), "x") for i in range(5)]


def test_groups_are_whole_and_distinct() -> None:
    assert [list(g) for g in Extent(batch=(2, 3)).groups([0, 2, 4, 6, 8])] == [[0, 2], [4, 6], [0, 2, 4]]
    assert Extent(batch=(3,)).groups([1, 2]) == Extent().groups([1, 2]) == []


def test_the_figures_are_medians_over_groups_of_paired_speeds() -> None:
    one, two = (System(name, Setting("m", None, None, 1, 0)) for name in NAMES)
    assert batch_entries([one, two], 1, 0) == []
    for system, times in ((one, (1.0, 2.0, 4.0)), (two, (2.0, 6.0, 16.0))):
        system.outcomes = {p: [Outcome((7,) * 5, 1.0, 0.1)] for p in range(6)}
        system.batches = {2: {2 * i: BatchOutcome(((7,) * 5, (7,) * 5), s) for i, s in enumerate(times)}}
    two.batches[2][4] = BatchOutcome(((7,) * 5, (8,) * 5), 16.0)
    first, second = batch_entries([one, two], 1, 0)
    assert (first["name"], first["batch"], first["groups"], first["same"]) == (NAMES[0], 2, 3, True)
    assert (first["tokens_per_second"], second["tokens_per_second"]) == (5, 10 / 6)
    ratio = first["against"][NAMES[1]]
    assert (ratio["low"], ratio["median"], ratio["high"]) == (2, 3, 4)
    assert not second["same"], "one prompt got other tokens than alone"


def test_batches_go_into_the_result_and_resume(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench_in_threads(monkeypatch)
    out, setting = tmp_path / "r.json", Setting(str(tiny_folder), None, None, 1, 0)

    def interrupt(done: int, total: int, what: str) -> None:
        if (done, total, what) == (1, 2, "adi:lookup:fp32, 2 at once"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(NAMES, ITEMS, setting, Extent(6, batch=(2,)), result=out, progress=interrupt)
    partial = out.with_name("r.json.partial")
    kept = json.loads(partial.read_text())
    assert list(kept["systems"][NAMES[0]]["batches"]["2"]) == ["0"], "one group was finished"
    assert len(kept["systems"][NAMES[0]]["outcomes"]) == len(ITEMS), "and all paired runs"
    kept["systems"][NAMES[0]]["batches"]["2"]["0"]["seconds"] = 1e-9
    partial.write_text(json.dumps(kept))
    seen: list[Any] = []
    found = bench(NAMES, ITEMS, setting, Extent(6, batch=(2,)), result=out, progress=lambda *now: seen.append(now))
    assert not [what for _, total, what in seen if total and "at once" not in what], "no paired run was left"
    for entry, name in zip(found["batches"], NAMES, strict=True):
        assert (entry["name"], entry["batch"], entry["groups"], entry["same"], entry["error"]) == (name, 2, 2, True, None)
    assert found["batches"][0]["against"][NAMES[1]]["high"] > 1e4, "the first group's figures are those that were kept"
    assert found["batch"] == (2,)


def test_a_batch_that_fails_is_a_line_of_its_own(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench_in_threads(monkeypatch)
    ask = System.ask
    monkeypatch.setattr(System, "ask", lambda one, what, *given: ask(one, "no such order" if what == "batch" else what, *given))
    found = bench(NAMES[:1], ITEMS[:2], Setting(str(tiny_folder), None, None, 1, 0), Extent(4, batch=(2,)))
    (entry,), (run,) = found["batches"], found["runs"]
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
    done = CliRunner().invoke(app, [*args, "--batch", "1,2", "--restarts", "2"])
    assert done.exit_code == 0, done.output
    table = done.stdout[done.stdout.index("as\n") if "as\n" in done.stdout else done.stdout.index("once") :]
    assert "adi:full:fp32" in table
    assert "yes" in table
    for given, complaint in (
        ("1,5", "--batch is 5; it must be at least 1, and at most the 4 prompts"),
        ("0", "--batch is 0"),
        ("two", "--batch is numbers of texts with commas, such as 1,4,16, not 'two'"),
    ):
        done = CliRunner().invoke(app, [*args, "--batch", given])
        assert done.exit_code == 2
        assert complaint in " ".join(done.output.split())
