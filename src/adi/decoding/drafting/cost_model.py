"""What passes cost on this machine by their number of rows, and what a step of the drafter costs."""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from adi.cache import cache_folder
from adi.errors import AdiError, MemoryFullError
from adi.files import write_json
from adi.machine import processor_hash
from adi.model.backbone import Backbone, Rows
from adi.model.load import Model
from adi.schema import NonNegative, Record, read_json_as

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
REPEATS = 7
COST_TABLE_VERSION = 5  # to be raised when passes come to cost something else, so that tables measured before are measured anew
PAST, FAR = 64, 512  # positions before a pass that is measured
LEARNING = 0.1  # weight of one more measurement during use
FADING = 0.995  # of what was learned of each number of rows, with every measurement
USUAL_ROWS = 16  # numbers of rows that a controller thinks of
PATIENCE = 20  # rounds without a further step of the drafter, from which on what was learned of them fades
OUTLIER = 0.45  # a measurement further off than this, as a logarithm, counts as one that is so far off
STALE = 0.02  # what was worked out is worked out anew once use has taught so much, as a logarithm, ...
KEPT, MOVED = 8, 16  # ... after so many passes, and so many positions on
FIRST, FURTHER = "first", "further"
_MEASURING = threading.Lock()  # two measurements at once would measure each other


@dataclass
class CostCorrection:
    """How much longer things take in use than the table says, as logarithms: ``common`` to all passes, and beside that ``own``
    to passes of about so many rows (1, 2 to 3, 4 to 7 and so on); ``steps`` of the drafter apart. One for all sequences of a
    model that have the same drafter: what a neighbour on the same machine takes away, it takes from all of them. What was
    learned of one number of rows, or of steps that are not taken, fades, or a slow moment would keep it from being tried."""

    common: float = 0.0
    own: dict[int, float] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    single: int = 0  # rounds in a row with one step at most
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)  # sequences may have threads

    def of(self, rows: int) -> float:
        """The factor for passes of so many rows."""
        return math.exp(self.common + self.own.get(rows.bit_length(), 0.0))

    def of_step(self, name: str) -> float:
        """The factor for a step of the drafter."""
        return math.exp(self.steps.get(name, 0.0))

    def passed(self, rows: int, ratio: float) -> None:
        """A pass took so many times what was expected."""
        off = LEARNING * _mild(ratio)
        with self._lock:
            for key in self.own:
                self.own[key] *= FADING
            self.common += off
            self.own[rows.bit_length()] = self.own.get(rows.bit_length(), 0.0) + off

    def stepped(self, name: str, ratio: float) -> None:
        """The same of a drafter's step."""
        with self._lock:
            self.steps[name] = self.steps.get(name, 0.0) + LEARNING * _mild(ratio)
            self.single = 0 if name == FURTHER else self.single + 1
            if self.single > PATIENCE and FURTHER in self.steps:
                self.steps[FURTHER] *= FADING


def _mild(ratio: float) -> float:
    return min(max(math.log(max(ratio, 1e-9)), -OUTLIER), OUTLIER)


@dataclass
class CostModel:
    """Seconds of a full pass with its head by number of rows, after ``PAST`` positions, and what each further position adds to
    it (attention goes row by row); of a drafter's first step after a pass and of a further one (None: the same). A pass reads
    so many weights that the drafter's are not at hand after it: on SmolLM2-135M a first step takes 0.9 ms, a further one 0.4.
    ``correction`` follows what use measures. A controller asks some forty times a round: the answers are kept for some rounds,
    until they would differ by some percent."""

    pass_seconds: dict[int, float]
    draft_seconds: float = 0.0
    further_seconds: float | None = None
    position_seconds: dict[int, float] = field(default_factory=dict)
    correction: CostCorrection = field(default_factory=CostCorrection)
    _beyond: int = 0  # positions past ``PAST``
    _learned: float = field(default=0.0, compare=False, repr=False)  # since the passes were worked out
    _passes: list[float] = field(default_factory=list, compare=False, repr=False)
    _steps: tuple[float, float] | None = field(default=None, compare=False, repr=False)
    _lines: list[tuple[float, float]] = field(default_factory=list, compare=False, repr=False)

    def at_position(self, length: int) -> None:
        """From now on passes come after about so many positions."""
        beyond = max(0, length - PAST)
        if abs(beyond - self._beyond) >= MOVED:
            self._beyond = beyond
            self._passes.clear()

    def rows(self, count: int) -> float:
        """Seconds of a pass of so many rows; between measured numbers, and beyond them, straight lines."""
        return self.passes(count)[count]

    def passes(self, most: int) -> Sequence[float]:
        """The same for all numbers of rows up to ``most`` at least, by that number."""
        known = self._passes
        if len(known) <= most:
            most = max(most, USUAL_ROWS)
            self._learned = 0.0
            known[:] = [self._plain(rows) for rows in range(most + 1)]
            for bits in range(1, most.bit_length() + 1):  # the factor is one for all numbers of so many bits
                factor = self.correction.of(1 << bits - 1)
                for rows in range(1 << bits - 1, min(1 << bits, most + 1)):
                    known[rows] *= factor
        return known

    def _plain(self, count: int) -> float:
        """By the table: the seconds of a pass after ``PAST`` positions, and more for those beyond."""
        if len(self._lines) <= count:
            self._line_up(count)
        seconds, each = self._lines[count]
        return seconds + each * self._beyond

    def _line_up(self, most: int) -> None:
        for rows in range(len(self._lines), most + 1):
            each = interpolate(self.position_seconds, rows) if self.position_seconds else 0.0
            self._lines.append((interpolate(self.pass_seconds, rows), each))

    def drafting(self, steps: int, sequences: int = 1) -> float:
        """Seconds of so many steps of the drafter in a row, each for so many sequences."""
        if not steps:
            return 0.0
        if self._steps is None:
            of_step = self.correction.of_step
            self._steps = self.draft_seconds * of_step(FIRST), self._further * of_step(FURTHER)
        first, further = self._steps
        return first + (steps - 1) * further

    @property
    def _further(self) -> float:
        return self.draft_seconds if self.further_seconds is None else self.further_seconds

    def passed(self, rows: int, seconds: float) -> None:
        """A pass was timed in use. One far off (the machine was busy) counts as a mild one."""
        ratio = seconds / (self._plain(rows) * self.correction.of(rows))  # others may have taught it since
        self.correction.passed(rows, ratio)
        self._learned += LEARNING * abs(_mild(ratio)) + STALE / KEPT
        if self._learned > STALE:
            self._passes.clear()

    def drafted(self, seconds: float, first: bool = True, sequences: int = 1) -> None:
        """A drafter's step was timed in use, the first after a pass or a further one."""
        name, table = (FIRST, self.draft_seconds) if first else (FURTHER, self._further)
        if table > 0:
            self.correction.stepped(name, seconds / (table * self.correction.of_step(name)))
            self._steps = None

    def copy(self) -> CostModel:
        """For one sequence, at a place of its own; what use teaches is shared."""
        return replace(self, _passes=[], _steps=None, _lines=[])


def interpolate(known: Mapping[int, float], at: int) -> float:
    """Straight lines between known values and beyond them, nowhere falling."""
    places = sorted(known)
    if len(places) == 1 or at <= places[0]:
        return known[places[0]]
    right = min(max(1, bisect_left(places, at)), len(places) - 1)
    a, b = places[right - 1], places[right]
    slope = (known[b] - known[a]) / (b - a)
    return known[a] + max(0.0, slope) * (at - a)


def cost_model_of(model: Model, key: str = "", draft: Callable[[], object] | None = None) -> CostModel:
    """For one sequence of this model. Measured once for a model, precision and machine, a second or two the first time, kept in
    the cache folder and, with what use teaches, with the model.

    ``draft`` makes one drafter step, ``key`` tells one drafter from another.
    """
    known: dict[str, CostModel] = model.notes.setdefault("costs", {})
    if key not in known:
        with _MEASURING:
            if key not in known:
                known[key] = _kept(model.backbone, key) or _measured(model.backbone, key, draft)
    return known[key].copy()


class CostTable(Record, frozen=True):
    """A ``CostModel`` as its file has it."""

    pass_seconds: dict[int, Annotated[float, Meta(gt=0, le=1e6)]]
    position_seconds: dict[int, NonNegative]
    draft: NonNegative
    further: NonNegative | None


def _file(backbone: Backbone, key: str) -> Path:
    spec = backbone.spec
    machine = processor_hash(f"{spec.device} {spec.threads}")
    name = f"{COST_TABLE_VERSION}-{spec.fingerprint}-{spec.backend}-{spec.precision}-{machine}-{key}"
    return cache_folder() / "costs" / f"{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}.json"


def _kept(backbone: Backbone, key: str) -> CostModel | None:
    """None where there is no such file, or none that can be used: it is measured again."""
    with contextlib.suppress(AdiError, OSError):
        found = read_json_as(_file(backbone, key), CostTable, "cost table")
        if found.pass_seconds and min(found.pass_seconds) == 1:
            return CostModel(found.pass_seconds, found.draft, found.further, found.position_seconds)
    return None


def _measured(backbone: Backbone, key: str, draft: Callable[[], object] | None) -> CostModel:
    costs = measure(backbone, draft)
    table = CostTable(costs.pass_seconds, costs.position_seconds, costs.draft_seconds, costs.further_seconds)
    with contextlib.suppress(AdiError):
        write_json(_file(backbone, key), table.to_json())
    return costs


def measure(backbone: Backbone, draft: Callable[[], object] | None = None) -> CostModel:
    """The least of a few passes of each number of rows, in turn, after one that is not counted; after few positions and, where
    the model's context allows, after many.

    The least and not the median: what other programs do meanwhile can only add to it, and the table is kept.
    """
    backbone.prepare((), drafts=True, wait=True)
    context = backbone.spec.context or FAR + max(ROWS)
    past = max(1, min(PAST, context - max(ROWS)))
    near, steps = _passes(backbone, past, draft)
    each: dict[int, float] = {}
    with contextlib.suppress(MemoryFullError):  # a small memory, where no text goes that far anyway, or a full one
        if FAR + max(ROWS) <= context:
            far, _ = _passes(backbone, FAR, None)
            more = {count: max(0.0, far[count] - near[count]) / (FAR - PAST) for count in near}
            each = {count: max(more[fewer] for fewer in near if fewer <= count) for count in near}
    first, further = steps or (0.0, None)
    return CostModel(near, first, further, each)


def _passes(backbone: Backbone, past: int, draft: Callable[[], object] | None) -> tuple[dict[int, float], list[float]]:
    """Seconds by number of rows after so many positions, and of the drafter's first and further steps."""
    context = backbone.spec.context or past + max(ROWS)
    counts = [count for count in ROWS if past + count <= context] or [1]
    ids = tuple(i % backbone.spec.vocabulary for i in range(past + max(counts)))
    with backbone.new_cache() as cache:
        backbone.forward([Rows(cache, 0, ids[:past], None)], 0, backbone.spec.layers)
        works = [partial(_pass, backbone, Rows(cache, past, ids[past : past + count], None)) for count in counts]
        times = seconds_in_turn([*works, *([draft] * 2 if draft is not None else [])], REPEATS + 1)
    least = [min(mine[1:]) for mine in times]
    return rising(counts, least[: len(counts)]), least[len(counts) :]


def _pass(backbone: Backbone, rows: Rows) -> None:
    (states,) = backbone.forward([rows], 0, backbone.spec.layers)
    backbone.greedy(states)


def seconds_in_turn(works: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Wall-clock seconds of each piece of work, all run in turn, so that a drift of the machine's speed meets them alike."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, mine in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            mine.append(time.perf_counter() - start)
    return times


def rising(rows: Sequence[int], seconds: Sequence[float]) -> dict[int, float]:
    """By number of rows; what seems to cost more than further rows do was measured while something else ran."""
    return {count: min(seconds[i:]) for i, count in enumerate(rows)}
