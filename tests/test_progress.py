"""Progress in a pipe: a line at least every 15 seconds, also while one step takes longer."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from adi.progress import Reporter, duration


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_pipe_gets_a_line_every_15_seconds_with_the_time_left(tmp_path: Path) -> None:
    read, write = os.pipe()
    clock, log = Clock(), tmp_path / "log.txt"
    with os.fdopen(write, "w") as pipe, Reporter(Console(file=pipe), log=log, clock=clock) as progress:
        for done in range(41):
            progress(done, 40, "answers")
            clock.now += 5
        progress(0, 3, "heads")
        progress(3, 3, "heads")
    with os.fdopen(read) as pipe:
        lines = pipe.read().splitlines()
    assert lines[0] == "answers: 3 of 40, 3 min left"
    assert lines[-2:] == ["answers: 39 of 40, 5 s left", "answers: 40 of 40 in 3 min"]
    assert len(lines) == 14
    assert [line.split(" ", 2)[2] for line in log.read_text().splitlines()] == [*lines, "heads: 3 of 3 in 0 s"]


def test_a_step_longer_than_that_is_reported_by_the_thread() -> None:
    clock, out = Clock(), io.StringIO()
    with Reporter(Console(file=out, width=20), clock=clock) as progress:
        progress(3, 40, "answers")
        clock.now += 15
        progress.beat()
        clock.now += 105
        deadline = time.monotonic() + 20
        while out.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert out.getvalue().splitlines() == ["answers: 3 of 40", "answers: still at 3 of 40, 2 min"]


def test_work_of_unknown_length_is_named_at_once_and_again() -> None:
    clock, out = Clock(), io.StringIO()
    with Reporter(Console(file=out), clock=clock) as progress:
        progress(0, 0, "exporting")
        progress(0, 0, "exporting")
        clock.now += 20
        progress(0, 0, "exporting")
        progress(0, 0, "compiling")
    assert out.getvalue().splitlines() == ["exporting", "exporting: 20 s so far", "compiling"]


def test_work_that_is_soon_done_is_not_named() -> None:
    clock, out = Clock(), io.StringIO()
    with Reporter(Console(file=out), "loading", clock=clock) as progress:
        clock.now += 10
        progress.beat()
        assert not out.getvalue()
        clock.now += 5
        progress.beat()
    assert out.getvalue() == "loading: 15 s so far\n"


def test_resumed_work_counts_its_own_steps_only() -> None:
    clock, out = Clock(), io.StringIO()
    with Reporter(Console(file=out), clock=clock) as progress:
        progress(30, 40, "answers")
        clock.now += 20
        progress(32, 40, "answers")
    assert out.getvalue() == "answers: 32 of 40, 80 s left\n"


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")  # a dumb one gets no bar
    clock, out = Clock(), io.StringIO()
    with Reporter(Console(file=out, force_terminal=True), clock=clock) as progress:
        progress(1, 40, "answers [bold]")
        clock.now += 60
        progress(20, 40, "answers [bold]")
    assert "20/40" in out.getvalue()
    assert "left" not in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (7500, "2 h 5 min")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
