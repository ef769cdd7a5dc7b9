"""Progress of long work: a bar on a terminal, elsewhere a line at least every 15 seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``: what is being done; a total of 0 says that its length is not known."""

EVERY_SECONDS = 15.0


def no_progress(done: int, total: int, what: str) -> None:
    """A ``Progress`` that reports to nobody."""


def duration(seconds: float) -> str:
    """Such as "12 s", "3 min", "2 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@dataclass
class _Stage:
    """A run of calls with one total: how far it is, since when, and where it began (not at 0 where work is resumed)."""

    done: int
    total: int
    what: str
    first: int
    began: float
    moved: float

    def line(self, now: float, stuck: bool) -> str:
        if not self.total:
            return f"{self.what}: {duration(now - self.began)} so far"
        at = f"{self.done} of {self.total}"
        if stuck:
            return f"{self.what}: still at {at}, {duration(now - self.moved)}"
        steps = self.done - self.first
        left = (now - self.began) * (self.total - self.done) / steps if steps else None
        return f"{self.what}: {at}" + ("" if left is None else f", {duration(left)} left")


class Reporter:
    """Shows progress while its ``with`` block runs; calling it is a ``Progress``.

    On a terminal it is a bar. Elsewhere a line goes to ``console`` (standard error) at least every ``every`` seconds, from a
    thread of its own where a single step takes longer; with ``log`` the lines go to that file as well, with the time of day,
    and every stage's end.
    ``what`` names the work until the first call.
    """

    def __init__(
        self,
        console: Console | None = None,
        what: str = "",
        log: Path | None = None,
        every: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True, highlight=False)
        self._log, self._every, self._clock = log, every, clock
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._stage = _Stage(0, 0, what, 0, clock(), clock())
        self._reported = (clock(), -1)  # when the last line was written, and how far the work was
        self._bar: Bar | None = None
        self._task: Any = None

    def __enter__(self) -> Reporter:
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn())
            bar = Progress(*columns, MofNCompleteColumn(), TimeRemainingColumn(), console=self._console, transient=True)
            self._bar = bar
            bar.start()
            self._task = bar.add_task(self._stage.what, total=None)
        threading.Thread(target=self._beats, name="adi-progress", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str = "") -> None:
        with self._lock:
            now, before = self._clock(), self._stage
            if total != before.total or done < before.done or (not total and what != before.what):
                self._stage = _Stage(done, total, what, done, now, now)
                self._reported = (now, -1)
                if self._bar is not None:
                    if not before.total:
                        self._bar.remove_task(self._task)
                    self._task = self._bar.add_task(what, total=total or None)
                if not total and what:
                    self._write(what, now)
            else:
                moved = now if done != before.done else before.moved
                self._stage = _Stage(done, total, what, before.first, before.began, moved)
            if self._bar is not None:
                self._bar.update(self._task, completed=done, description=what)
            if 0 < total <= done and (before.done, before.total) != (done, total):
                took = now - self._stage.began
                self._write(f"{what}: {done} of {total} in {duration(took)}", now, logged_only=took < self._every)
            self.beat()

    def beat(self) -> None:
        """Write a line if the last one is long ago."""
        with self._lock:
            stage, now = self._stage, self._clock()
            if not stage.what or now - self._reported[0] < self._every:
                return
            self._write(stage.line(now, stage.done == self._reported[1]), now)

    def _beats(self) -> None:
        while not self._ended.wait(min(1.0, self._every / 4)):
            self.beat()

    def _write(self, text: str, now: float, logged_only: bool = False) -> None:
        self._reported = (now, self._stage.done)
        if self._bar is None and not logged_only:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        if self._log is not None:
            with suppress(OSError), self._log.open("a", encoding="utf-8") as file:  # the work matters more
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
