"""What passes cost on this machine by their number of rows, and what a step of the drafter costs: learned from use."""

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
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from adi.cache import cache_folder
from adi.decoding.drafting.trial import Trials
from adi.errors import AdiError, MemoryFullError
from adi.files import write_json
from adi.machine import processor_hash
from adi.model.backbone import Backbone, Rows
from adi.model.load import Model
from adi.schema import Natural, Positive, Record, read_json_as

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
REPEATS = 7
COST_TABLE_VERSION = 6  # to be raised when passes come to cost something else, so that what was learned before is forgotten
# Of a pass of one row: what more rows take, on the compiled engine, rather less than most machines; a step of the drafter, a
# further one, and each in one call for more sequences; and a position more, for each row.
USUAL = {1: 0.01, 3: 0.0112, 8: 0.014, 16: 0.023, 32: 0.038, 64: 0.07}
USUAL_STEP, USUAL_FURTHER, MORE_SEQUENCES, USUAL_POSITION = 0.0012, 0.0006, 0.1, 2e-6
SURE, NEAR = 4, 1.5  # timed so often, numbers of rows up to so many times more are known
PAST, FAR = 64, 512  # positions before a pass that is measured
LEARNING, FAR_LEARNING = 0.1, 0.5  # weight of one more measurement during use; for what positions add
FADING, SLOWLY = 0.995, 0.9995  # of what was learned of each number of rows, with every measurement; of usual costs
USUAL_ROWS = 64  # numbers of rows that are worked out together: those that share a pass
PATIENCE = 20  # rounds without a further step of the drafter, from which on what was learned of them fades
OUTLIER = 0.45  # a measurement further off than this, as a logarithm, counts as one that is so far off
STALE = 0.03  # what was worked out is worked out anew once use has taught so much, as a logarithm, ...
KEPT, MOVED = 8, 16  # ... after so many passes, and so many positions on
FIRST, FURTHER = "first", "further"
Logarithm = Annotated[float, Meta(ge=-50, le=50)]
_READING = threading.Lock()


@dataclass
class CostCorrection:
    """How much longer things take in use than the table says, as logarithms: ``common`` to all passes, and beside that ``own``
    to passes of so many rows; ``far`` to what positions add; ``steps`` of the drafter apart, by kind and number of sequences.
    One for all sequences of a model that have the same drafter: what a neighbour on the same machine takes away, it takes from
    all of them. What was learned of one number of rows, or of steps that are not taken, fades, or a slow moment would keep it
    from being tried.

    ``timed`` counts passes by their rows where the table has only what is usual; None where it was measured. What was seldom
    timed then counts for more, but for its first time, when kernels for its shape are made. ``trials``: whether drafting pays
    at all where sequences share passes.
    """

    common: float = 0.0
    own: dict[int, float] = field(default_factory=dict)
    far: float = 0.0
    steps: dict[str, float] = field(default_factory=dict)
    timed: dict[int, int] | None = None
    trials: Trials = field(default_factory=Trials, compare=False, repr=False)
    single: int = 0  # rounds in a row with one step at most
    written: int = 2 * SURE  # passes that had been timed when it was written last
    _taken: dict[str, int] = field(default_factory=dict, compare=False, repr=False)  # steps of each kind
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)  # sequences may have threads

    def of(self, rows: Any) -> Any:
        """The factor for passes of so many rows, or of each of several numbers; between those known, straight lines."""
        return np.exp(self.common + self._own(rows, self.own))

    def of_step(self, kind: str) -> float:
        """The factor for a step of the drafter."""
        return math.exp(self.steps.get(kind, self.steps.get(kind.partition(" ")[0], self._usual)))

    def unsure(self, rows: int) -> bool:
        """Whether nothing was timed that is near this number of rows."""
        with self._lock:
            sure = [one for one, times in (self.timed or {}).items() if times >= SURE]
        return self.timed is not None and not any(rows <= NEAR * one and one <= NEAR * rows for one in sure)

    def passed(self, rows: int, ratio: float, far: float = 0.0) -> float:
        """A pass took so many times what was expected; positions make a share of ``far`` of that. How far that moved the
        factor of any number of rows, at most, as a logarithm."""
        with self._lock:
            place, weight, off, fading = node(rows), LEARNING, _mild(ratio), FADING
            if self.timed is not None:
                times = self.timed[rows] = self.timed.get(rows, 0) + 1
                if times == 1:
                    return 0.0
                weight, fading = max(LEARNING, 1 / (times - 1)), SLOWLY
                if times > SURE:
                    self.far, off = self.far + FAR_LEARNING * far * off, (1 - far) * off
            was, faded = self.common, (1 - fading) * max(map(abs, self.own.values()), default=0.0)
            if not self.own:  # the first pass of all tells how fast the machine is
                self.common, off = math.log(max(ratio, 1e-9)), 0.0
            before = float(self._own(place, self.own))
            self.own = {one: value * fading for one, value in self.own.items()}
            self.own[place] = before * fading + weight * off
            self.common += LEARNING * off
            return abs(self.common - was) + faded + weight * abs(off)

    def stepped(self, kind: str, ratio: float) -> None:
        """The same of a drafter's step."""
        with self._lock:
            before, times = math.log(self.of_step(kind)), self._taken.get(kind, 0)
            self._taken[kind] = times + 1
            if self.timed is None or times:
                self.steps[kind] = before + (LEARNING if self.timed is None else max(LEARNING, 1 / (1 + times))) * _mild(ratio)
            self.single = 0 if kind == FURTHER else self.single + 1
            if self.single > PATIENCE and FURTHER in self.steps:
                self.steps[FURTHER] += (1 - FADING) * (self._usual - self.steps[FURTHER])

    @property
    def _usual(self) -> float:
        return 0.0 if self.timed is None else self.common

    def _own(self, rows: Any, own: Mapping[int, float]) -> Any:
        known = sorted(own)
        return np.interp(rows, known, [own[one] for one in known]) if known else np.zeros(np.shape(rows))


def _mild(ratio: float) -> float:
    return min(max(math.log(max(ratio, 1e-9)), -OUTLIER), OUTLIER)


def node(rows: int) -> int:
    """The number of rows that stands for this one and its neighbours: beyond 16 they differ little."""
    return rows if rows <= 16 else 4 * round(rows / 4) if rows <= 32 else 8 * round(rows / 8)


@dataclass
class CostModel:
    """Seconds of a full pass with its head by number of rows, all sequences together, after ``PAST`` positions, and what each
    further position adds to it (attention goes row by row); of a drafter's first step after a pass and of a further one (None:
    the same). A pass reads so many weights that the drafter's are not at hand after it: on SmolLM2-135M a first step takes
    0.9 ms, a further one 0.4. ``correction`` follows what use measures. A controller asks some forty times a round: the
    answers are kept for some rounds, until they would differ by some percent."""

    pass_seconds: dict[int, float]
    draft_seconds: float = 0.0
    further_seconds: float | None = None
    position_seconds: dict[int, float] = field(default_factory=dict)
    correction: CostCorrection = field(default_factory=CostCorrection)
    path: Path | None = None
    _beyond: int = 0  # positions past ``PAST``
    _learned: float = field(default=0.0, compare=False, repr=False)  # since the passes were worked out
    _passes: list[float] = field(default_factory=list, compare=False, repr=False)
    _lines: Any = field(default_factory=lambda: np.zeros((2, 0)), compare=False, repr=False)  # by rows, before correction

    def __post_init__(self) -> None:
        if self.correction.timed is None and not self.correction.own:
            self.correction.own = {node(rows): 0.0 for rows in self.pass_seconds}

    @classmethod
    def usual(cls, correction: CostCorrection) -> CostModel:
        """By what passes of most models cost, relative to one another, until use has told more."""
        return cls(USUAL, USUAL_STEP, USUAL_FURTHER, {1: USUAL_POSITION, 64: 64 * USUAL_POSITION}, correction)

    def at_position(self, length: int) -> None:
        """From now on passes come after about so many positions."""
        beyond = max(0, length - PAST)
        if abs(beyond - self._beyond) >= MOVED:
            self._beyond = beyond
            self._passes = []

    def rows(self, count: int) -> float:
        """Seconds of a pass of so many rows; between known numbers, and beyond them, straight lines."""
        return self.passes(count)[count]

    def passes(self, most: int) -> Sequence[float]:
        """The same for all numbers of rows up to ``most`` at least, by that number."""
        known = self._passes
        if len(known) <= most:
            most = max(most, USUAL_ROWS)
            self._learned = 0.0
            corrected = self._plain(np.arange(most + 1)) * self.correction.of(np.arange(most + 1))
            self._passes = known = np.minimum.accumulate(corrected[::-1])[::-1].tolist()  # more rows are never quicker
        return known

    def _plain(self, rows: Any) -> Any:
        """By the table: the seconds of a pass after ``PAST`` positions, and more for those beyond; of a number of rows, or of
        each of several."""
        if (most := int(np.max(rows))) >= self._lines.shape[1]:
            counts, tables = range(max(most, USUAL_ROWS) + 1), (self.pass_seconds, self.position_seconds or {1: 0.0})
            self._lines = np.array([[interpolate(table, count) for count in counts] for table in tables])
        seconds, each = self._lines[:, rows]
        return seconds + each * self._beyond * math.exp(self.correction.far)

    def drafting(self, steps: int, sequences: int = 1) -> float:
        """Seconds of so many steps of the drafter in a row, each for so many sequences."""
        if not steps:
            return 0.0
        return self._step(FIRST, sequences) + (steps - 1) * self._step(FURTHER, sequences)

    def _step(self, kind: str, sequences: int) -> float:
        return self._plain_step(kind, sequences) * self.correction.of_step(_of_several(kind, sequences))

    def _plain_step(self, kind: str, sequences: int) -> float:
        further = self.draft_seconds if self.further_seconds is None else self.further_seconds
        return (self.draft_seconds if kind == FIRST else further) * (1 + MORE_SEQUENCES * (sequences - 1))

    def passed(self, rows: int, seconds: float) -> None:
        """A pass was timed in use. One far off (the machine was busy) counts as a mild one."""
        expected = float(self._plain(rows))
        ratio = seconds / (expected * float(self.correction.of(rows)))  # others may have taught it since
        moved = self.correction.passed(rows, ratio, 1 - float(self._lines[0, rows]) / expected)
        self._learned += moved + STALE / KEPT
        if self._learned > STALE:
            self._passes = []

    def drafted(self, seconds: float, first: bool = True, sequences: int = 1) -> None:
        """A drafter's step was timed in use, the first after a pass or a further one, of so many sequences in one call."""
        kind = FIRST if first else FURTHER
        if (expected := self._step(kind, sequences)) > 0:
            self.correction.stepped(_of_several(kind, sequences), seconds / expected)

    def keep(self) -> None:
        """Write down what use has taught, where that is much more than was written before."""
        learned = self.correction
        if self.path is not None and learned.timed is not None and sum(learned.timed.values()) >= 2 * learned.written:
            learned.written = sum(learned.timed.values())
            table = CostTable(learned.common, learned.far, learned.own, learned.steps, learned.timed)
            with contextlib.suppress(AdiError):
                write_json(self.path, table.to_json())

    def copy(self) -> CostModel:
        """For one sequence, at a place of its own; what use teaches is shared."""
        return replace(self, _passes=[])


def _of_several(kind: str, sequences: int) -> str:
    """One name for about so many sequences."""
    return kind if sequences == 1 else f"{kind} {sequences.bit_length()}"


def interpolate(known: Mapping[int, float], at: int) -> float:
    """Straight lines between known values and beyond them, nowhere falling."""
    places = sorted(known)
    if len(places) == 1 or at <= places[0]:
        return known[places[0]]
    right = min(max(1, bisect_left(places, at)), len(places) - 1)
    a, b = places[right - 1], places[right]
    slope = (known[b] - known[a]) / (b - a)
    return known[a] + max(0.0, slope) * (at - a)


def cost_model_of(model: Model, key: str = "") -> CostModel:
    """For one sequence of this model. Nothing is measured for it: passes are timed as they come, and what use teaches is kept
    with the model and, by ``CostModel.keep``, in the cache folder, for a model, precision and machine.

    ``key`` tells one drafter from another.
    """
    known: dict[str, CostModel] = model.notes.setdefault("costs", {})
    with _READING:
        if key not in known:
            path = _file(model.backbone, key)
            known[key] = replace(CostModel.usual(_kept(path)), path=path)
    return known[key].copy()


class CostTable(Record, frozen=True):
    """A ``CostCorrection`` as its file has it."""

    common: Logarithm
    far: Logarithm
    own: dict[Positive, Logarithm]
    steps: dict[str, Logarithm]
    timed: dict[Positive, Natural]


def _file(backbone: Backbone, key: str) -> Path:
    spec = backbone.spec
    machine = processor_hash(f"{spec.device} {spec.threads}")
    name = f"{COST_TABLE_VERSION}-{spec.fingerprint}-{spec.backend}-{spec.numbers}-{machine}-{key}"
    return cache_folder() / "costs" / f"{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}.json"


def _kept(path: Path) -> CostCorrection:
    """Of the file; nothing known yet where there is none, or none that can be used."""
    with contextlib.suppress(AdiError, OSError):
        found = read_json_as(path, CostTable, "cost table")
        timed = dict(found.timed)
        return CostCorrection(
            found.common, dict(found.own), found.far, dict(found.steps), timed, written=max(2 * SURE, sum(timed.values()))
        )
    return CostCorrection(timed={})


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
