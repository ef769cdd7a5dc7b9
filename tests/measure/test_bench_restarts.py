"""Benchmarks whose systems' processes are started anew: what their luck does to an interval, and who runs what."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from adi.measure.bench.outcomes import Setting
from adi.measure.bench.run import Extent, bench
from adi.measure.bench.summary import interval, part_of
from adi.measure.bench.worker import System
from adi.measure.statistics import clustered_median
from adi.prompts import PromptItem
from support import bench_in_threads

NAMES = ["adi:full:fp32", "adi:lookup:fp32"]
ITEMS = [PromptItem((f"the dog {i}",), "x") for i in range(5)]


def test_one_restart_is_the_plain_interval() -> None:
    values = {p: float(p * p % 7) for p in range(20)}
    assert interval(values, 1, 3) == asdict(clustered_median([list(values.values())], seed=3))
    assert clustered_median([[], [1.0, 2.0]]) == clustered_median([[1.0, 2.0]])
    assert sorted(part_of(p, 3) for p in range(7)) == [0, 0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="at least one"):
        clustered_median([[]])


def test_every_part_has_processes_of_its_own(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench_in_threads(monkeypatch)
    started: list[str] = []
    start = System.start
    monkeypatch.setattr(System, "start", lambda one: (started.append(one.name), start(one)))
    out, setting, seen = tmp_path / "r.json", Setting(str(tiny_folder), None, None, 1, 0), []

    def interrupt(done: int, total: int, what: str) -> None:
        seen.append((done, what))
        if done == 8:  # three prompts of the first part are finished, and one of the second
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(NAMES, ITEMS, setting, Extent(4, restarts=2), result=out, progress=interrupt)
    assert started == NAMES * 2
    order = [what for done, what in seen if done]
    assert order[:6] == [*NAMES, *NAMES[::-1], *NAMES], "the order turns within a part"
    kept = json.loads(out.with_name("r.json.partial").read_text())
    assert set(kept["systems"][NAMES[0]]["outcomes"]) == {"0", "2", "4"}, "the first part, whole"
    started.clear()
    again: list[Any] = []
    found = bench(NAMES, ITEMS, setting, Extent(4, restarts=2), result=out, progress=lambda *now: again.append(now))
    assert started == NAMES, "the first part is not run again"
    assert [done for done, total, _ in again if total] == [7, 8, 9, 10]
    assert found["restarts"] == 2
    assert all(run["match"] == 1 for run in found["runs"])


def test_more_restarts_than_prompts_are_refused(tiny_folder: Path) -> None:
    for restarts in (0, 6):
        with pytest.raises(ValueError, match=f"--restarts is {restarts} and there are 5 prompts"):
            bench(NAMES, ITEMS, Setting(str(tiny_folder), None, None, 1, 0), Extent(4, restarts=restarts))
