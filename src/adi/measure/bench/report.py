"""The page of ``adi plot`` for a benchmark's result: speeds with intervals, ratios against full depth, categories."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from adi.errors import FileError, UsageError
from adi.files import read_json
from adi.measure.bench.run import FORMAT, VERSION
from adi.measure.pages import render
from adi.schema import Natural, Share, from_json

LEFT, WIDE, TICKS = 210, 560, 6  # pixels of names and of the plot; marks on a scale of speeds
PEEK = 256  # bytes in which a result names its format
Speed = Annotated[float, Meta(gt=1e-12, lt=1e12)]
Tick = tuple[float, str, str]  # where, label, class
Scale = tuple[Callable[[float], float], list[Tick]]


class CategoryFigures(Struct):
    tokens_per_second: Speed


class RunFigures(Struct):
    """What the page shows of a system that ran."""

    name: str
    tokens_per_second: Speed
    tokens_per_second_low: Speed
    tokens_per_second_high: Speed
    ttft_seconds: Speed
    peak_bytes: Natural
    tokens_per_round: Speed | None
    accepted_share: Share | None
    match: Share | None
    match_tokens: Share | None
    match_with: str | None
    per_category: dict[str, CategoryFigures]
    about: str = ""

    @property
    def kind(self) -> str:
        return "own" if self.name.startswith("adi:") else "other"


class FailedRun(Struct):
    name: str
    error: str


class PairedRatio(Struct):
    """How many times faster ``a`` is than ``b``."""

    a: str
    b: str
    median: Speed
    low: Speed
    high: Speed


class BenchResult(Struct):
    """What the page needs of a result."""

    command: str
    model: str
    prompts: int
    max_new_tokens: int
    machine: str
    threads: int
    versions: dict[str, str]
    runs: list[dict[str, Any]]
    ratios: list[PairedRatio]
    processor: str = ""
    prompt_tokens: int | None = None


def is_result(path: str | os.PathLike[str]) -> bool:
    """Whether the beginning of a file names a benchmark's format."""
    try:
        with Path(path).open("rb") as file:
            return re.search(rb'"format":\s*"adi-bench"', file.read(PEEK)) is not None
    except OSError:
        return False  # reading it raises what is wrong


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the result of ``adi bench --json``; FileError for a file that is none, or damaged."""
    value = read_json(Path(path), "benchmark")
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
        raise FileError(f"{path} is not a benchmark of version {VERSION} (adi bench --json FILE makes one).")
    _parsed(value, f"the benchmark {path} is damaged")
    return value


def bench_page(result: Mapping[str, Any], base: str | None = None) -> str:
    """The whole page. Ratios are against ``base``, one of adi's modes; by default against full depth as each was compared."""
    found, ran, failed = _parsed(result, "the result")
    own = [run.name for run in ran if run.kind == "own"]
    if base is not None and base not in own:
        raise UsageError(f"--base {base!r} is none of adi's modes in this result; choose among {', '.join(own)}.")
    categories = sorted({name for run in ran for name in run.per_category})
    speeds = [(name, figures.tokens_per_second) for run in ran for name, figures in run.per_category.items()]
    pairs = [(run, ratio) for run in ran if (ratio := against_base(run, found.ratios, base)) is not None]
    return render(
        "bench.html",
        result=found,
        ran=ran,
        failed=failed,
        base=base,
        pairs=pairs,
        speeds=_speed_scale(ran),
        ratios=_ratio_scale([ratio for _, ratio in pairs]),
        categories=categories,
        best={name: max(speed for category, speed in speeds if category == name) for name in categories},
        left=LEFT,
        wide=WIDE,
    )


def against_base(run: RunFigures, ratios: Sequence[PairedRatio], base: str | None = None) -> PairedRatio | None:
    """How many times faster than its base, by default its full depth, a run is. None where the pair was not measured.

    The file holds adi's mode over the other one; where the base is that mode, the ratio is inverted.
    """
    other = base or run.match_with
    if other == run.name:
        return PairedRatio(run.name, run.name, 1.0, 1.0, 1.0)
    pairs = {(ratio.a, ratio.b): ratio for ratio in ratios}
    if other is not None and (inverse := pairs.get((other, run.name))) is not None and (run.name, other) not in pairs:
        return PairedRatio(run.name, other, 1 / inverse.median, 1 / inverse.high, 1 / inverse.low)
    return pairs.get((run.name, other or ""))


def _parsed(value: Any, what: str) -> tuple[BenchResult, list[RunFigures], list[FailedRun]]:
    """The result, its runs by speed, and those that failed; FileError says ``what``, and where it is not as it must be."""
    found = from_json(value, BenchResult, what)
    ran = from_json([run for run in found.runs if run.get("error") is None], list[RunFigures], f"{what}, runs")
    failed = from_json([run for run in found.runs if run.get("error") is not None], list[FailedRun], f"{what}, runs")
    return found, sorted(ran, key=lambda run: -run.tokens_per_second), failed


def _speed_scale(ran: Sequence[RunFigures]) -> Scale:
    """Linear, from 0 to the largest."""
    most = max((run.tokens_per_second_high for run in ran), default=1.0)
    step = _step(most / TICKS)

    def place(speed: float) -> float:
        return LEFT + WIDE * speed / most

    return place, [(place(i * step), f"{i * step:g}", "rule") for i in range(int(most / step) + 1)]


def _ratio_scale(ratios: Sequence[PairedRatio]) -> Scale:
    """Logarithmic, with a mark at each power of two."""
    low = min([0.5, *(ratio.low for ratio in ratios)])
    high = max([2.0, *(ratio.high for ratio in ratios)])

    def place(ratio: float) -> float:
        return LEFT + WIDE * math.log2(ratio / low) / math.log2(high / low)

    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    return place, [(place(2.0**n), f"{2.0**n:g} x", "one" if n == 0 else "rule") for n in powers]


def _step(rough: float) -> float:
    """The first of 1, 2, 5 times a power of ten that is not smaller."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((m * power for m in (1, 2, 5) if m * power >= rough), 10 * power)
