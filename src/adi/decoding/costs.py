"""What passes cost on this machine by their number of rows, and what a step of the drafter costs."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adi.files import cache_folder, read_json, write_json
from adi.model.backbone import Backbone, Rows

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
REPEATS = 7
ENGINES = 4  # to be raised when passes come to cost something else, so that tables measured before are measured anew
PAST = 64
LATELY = 0.05  # weight of one more measurement during use
DRAFTED_LATELY = 0.1  # the same of a drafter's step: there are few, where it was thought to cost too much
OUTLIER = 3.0


@dataclass
class Costs:
    """Seconds of a full pass with its head by number of rows, and of a drafter's first step after one and of a further step
    (None: the same); all follow what use measures. A pass reads so many weights that the drafter's are not at hand after it: on
    SmolLM2-135M a first step takes 0.9 ms and a further one 0.4."""

    pass_seconds: dict[int, float]
    draft_seconds: float = 0.0
    further_seconds: float | None = None
    _table: list[float] = field(default_factory=list)

    def rows(self, count: int) -> float:
        """Seconds of a pass of so many rows; between measured numbers, and beyond them, straight lines."""
        while len(self._table) <= count:
            self._table.append(self._between(len(self._table)))
        return self._table[count]

    def _between(self, count: int) -> float:
        known = sorted(self.pass_seconds)
        if len(known) == 1 or count <= known[0]:
            return self.pass_seconds[known[0]]
        at = min(max(1, bisect_left(known, count)), len(known) - 1)
        a, b = known[at - 1], known[at]
        slope = (self.pass_seconds[b] - self.pass_seconds[a]) / (b - a)
        return self.pass_seconds[a] + max(0.0, slope) * (count - a)

    def drafting(self, steps: int) -> float:
        """Seconds of so many steps of the drafter in a row."""
        further = self.draft_seconds if self.further_seconds is None else self.further_seconds
        return self.draft_seconds + (steps - 1) * further if steps else 0.0

    def tokens_per_second(self, tokens: float, drafts: int, steps: int) -> float:
        """Of a round that gives so many tokens from one pass over ``drafts + 1`` rows and so many drafter steps."""
        return tokens / (self.rows(drafts + 1) + self.drafting(steps))

    def passed(self, rows: int, seconds: float) -> None:
        """A pass was timed in use. One far off (the machine was busy) counts as a mild one."""
        expected = self.rows(rows)
        seconds = min(max(seconds, expected / OUTLIER), OUTLIER * expected)
        self._table[rows] += LATELY * (seconds - expected)

    def drafted(self, seconds: float, first: bool = True) -> None:
        """A drafter's step was timed in use, the first after a pass or a further one."""
        if first or self.further_seconds is None:
            self.draft_seconds = _follow(self.draft_seconds, seconds)
        else:
            self.further_seconds = _follow(self.further_seconds, seconds)

    def copy(self) -> Costs:
        """For one sequence, whose long text will make its passes cost more."""
        return Costs(dict(self.pass_seconds), self.draft_seconds, self.further_seconds, list(self._table))


def _follow(known: float, seconds: float) -> float:
    return known + DRAFTED_LATELY * (min(seconds, OUTLIER * max(known, 1e-6)) - known)


def costs_of(backbone: Backbone, key: str = "", draft: Callable[[], object] | None = None) -> Costs:
    """Measured once for a model, precision and machine, and kept in the cache folder; a second or two the first time.

    ``draft`` makes one drafter step, ``key`` tells one drafter from another.
    """
    spec = backbone.spec
    name = f"{ENGINES}-{spec.fingerprint}-{spec.backend}-{spec.precision}-{_machine(backbone)}-{key}"
    note = cache_folder() / "costs" / f"{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}.json"
    with contextlib.suppress(ValueError, OSError):
        if (found := _parsed(read_json(note, "cost table"))) is not None:
            return found
    costs = measure(backbone, draft)
    with contextlib.suppress(OSError, ValueError):
        note.parent.mkdir(parents=True, exist_ok=True)
        passes = {str(count): seconds for count, seconds in costs.pass_seconds.items()}
        write_json(note, {"pass_seconds": passes, "draft": costs.draft_seconds, "further": costs.further_seconds})
    return costs


def measure(backbone: Backbone, draft: Callable[[], object] | None = None) -> Costs:
    """The least of a few passes of each number of rows, in turn, after one that is not counted.

    The least and not the median: what other programs do meanwhile can only add to it, and the table is kept.
    """
    backbone.prepare((), drafts=True, wait=True)
    layers, cache = backbone.spec.layers, backbone.new_cache()
    context = backbone.spec.context or PAST + max(ROWS)
    past = max(1, min(PAST, context - max(ROWS)))
    counts = [count for count in ROWS if past + count <= context] or [1]
    ids = tuple(i % backbone.spec.vocabulary for i in range(past + max(counts)))
    backbone.forward([Rows(cache, 0, ids[:past], None)], 0, layers)
    times: dict[int, list[float]] = {count: [] for count in counts}
    drafts: list[tuple[float, float]] = []
    for _ in range(REPEATS + 1):
        for count in counts:
            start = time.perf_counter()
            (states,) = backbone.forward([Rows(cache, past, ids[past : past + count], None)], 0, layers)
            backbone.greedy(states.hidden_TD)
            times[count].append(time.perf_counter() - start)
        if draft is not None:
            drafts.append((_seconds(draft), _seconds(draft)))
    close = getattr(cache, "close", None)
    if close is not None:
        close()
    first, further = (min(each) for each in zip(*drafts[1:], strict=True)) if drafts else (0.0, None)
    return Costs({count: min(t[1:]) for count, t in times.items()}, first, further)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _parsed(value: Any) -> Costs | None:
    """None for what is no cost table of this form: it is measured again."""
    if not isinstance(value, Mapping) or not isinstance(value.get("pass_seconds"), Mapping):
        return None
    draft: Any = value.get("draft")
    further: Any = value.get("further")
    numbers = (*value["pass_seconds"].values(), draft, *(() if further is None else (further,)))
    if any(not isinstance(number, (int, float)) for number in numbers):
        return None
    seconds = {int(k): float(v) for k, v in value["pass_seconds"].items()}
    sane = seconds and min(seconds) == 1 and all(0 < v < float("inf") for v in seconds.values())
    sane = sane and all(0 <= number < float("inf") for number in numbers)
    return Costs(seconds, float(draft), None if further is None else float(further)) if sane else None


def _machine(backbone: Backbone) -> str:
    text = platform.processor() + platform.machine() + backbone.spec.device + str(getattr(backbone, "threads", ""))
    with contextlib.suppress(OSError):
        text += next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
