"""Cost tables: measured once, kept, and measured again where the file is no table."""

from __future__ import annotations

import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adi
from adi.decoding.drafting import cost_model as module
from adi.decoding.drafting.cost_model import CostCorrection, CostModel, cost_model_of, measure
from adi.errors import MemoryFullError


def loaded(model: adi.Model) -> adi.Model:
    """The same as if loaded once more: nothing is known of it yet."""
    return replace(model, notes={})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """One entry for every measurement; the cache folder is empty at first."""
    calls: list[object] = []

    def counted(backbone: object, draft: object = None) -> CostModel:
        calls.append(draft)
        return CostModel({1: 0.5, 4: 0.75}, 0.125 if draft else 0.0)

    monkeypatch.setattr(module, "measure", counted)
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    return calls


def test_a_table_is_measured_once(llama: adi.Model, measured: list[object], tmp_path: Path) -> None:
    llama = loaded(llama)
    first = cost_model_of(llama, "a", lambda: None)
    again = cost_model_of(loaded(llama), "a", lambda: None)
    assert (first.pass_seconds, first.draft_seconds) == (again.pass_seconds, again.draft_seconds) == ({1: 0.5, 4: 0.75}, 0.125)
    assert len(measured) == 1
    assert cost_model_of(llama).draft_seconds == 0
    assert len(measured) == 2, "another drafter, or none, is another table"
    assert len(list((tmp_path / "costs").iterdir())) == 2


DAMAGED: list[Any] = [
    "",
    "{",
    "[]",
    "null",
    {},
    {"pass_seconds": []},
    {"pass_seconds": {}},
    {"pass_seconds": {"2": 0.5}},
    {"pass_seconds": {"one": 0.5}},
    {"pass_seconds": {"1": None}},
    {"pass_seconds": {"1": [0.5]}},
    {"pass_seconds": {"1": 0}},
    {"pass_seconds": {"1": -1}},
    {"pass_seconds": {"1": float("nan")}},
    {"pass_seconds": {"1": 0.5, "0": 0.5}},
    {"pass_seconds": {"1": 0.5}, "draft": 0.0},
    {"pass_seconds": {"1": 0.5}, "position_seconds": [], "draft": 0.0},
    {"pass_seconds": {"1": 0.5}, "position_seconds": {"1": -1}, "draft": 0.0},
    {"pass_seconds": {"1": 0.5}, "position_seconds": {"1": "x"}, "draft": 0.0},
    {"pass_seconds": {"1": 0.5}, "position_seconds": {"1": float("inf")}, "draft": 0.0},
    {"pass_seconds": {"1": 0.5}, "draft": None},
    {"pass_seconds": {"1": 0.5}, "draft": []},
    {"pass_seconds": {"1": 0.5}, "draft": -1},
    {"pass_seconds": {"1": 0.5}, "draft": float("nan")},
]


@pytest.mark.parametrize("content", DAMAGED, ids=str)
def test_a_damaged_table_is_measured_again(llama: adi.Model, measured: list[object], tmp_path: Path, content: Any) -> None:
    cost_model_of(loaded(llama))
    (note,) = (tmp_path / "costs").iterdir()
    whole = note.read_text()
    note.write_text(content if isinstance(content, str) else json.dumps(content))
    assert cost_model_of(loaded(llama)).pass_seconds == {1: 0.5, 4: 0.75}
    assert len(measured) == 2
    assert note.read_text() == whole, "and written anew"


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    llama: adi.Model, measured: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADI_CACHE", str(tmp_path / "file"))
    assert cost_model_of(loaded(llama)).rows(1) == cost_model_of(loaded(llama)).rows(1) == 0.5
    assert len(measured) == 2


def test_what_is_measured_is_positive_and_covers_every_number_of_rows(llama: adi.Model) -> None:
    steps: list[int] = []
    costs = measure(llama.backbone, lambda: steps.append(1))
    assert set(costs.pass_seconds) == set(module.ROWS)
    assert len(steps) == 2 * (module.REPEATS + 1), "after every round of passes a first step and a further one"
    assert costs.further_seconds is not None
    assert costs.drafting(3) == pytest.approx(costs.draft_seconds + 2 * costs.further_seconds)
    assert all(costs.rows(count) > 0 for count in range(1, 40))
    assert costs.rows(40) >= costs.rows(16)


def test_first_and_further_steps_of_the_drafter_follow_use_apart() -> None:
    costs = CostModel({1: 1.0}, 0.5, 0.25)
    assert (costs.drafting(0), costs.drafting(1), costs.drafting(3)) == (0, 0.5, 1.0)
    for _ in range(200):
        costs.drafted(0.8)
        costs.drafted(0.1, first=False)
    assert costs.drafting(1) == pytest.approx(0.8)
    assert costs.drafting(3) == pytest.approx(1.0)
    assert costs.copy() == costs
    assert CostModel({1: 1.0}, 0.5).drafting(3) == 1.5, "where a further one is not known it takes as long as the first"


def test_far_into_a_text_passes_cost_more_by_their_rows() -> None:
    costs = CostModel({1: 10.0, 4: 12.0}, position_seconds={1: 0.01, 4: 0.03})
    costs.at_position(64 + 100)
    assert [costs.rows(n) for n in (1, 2, 4)] == pytest.approx([11.0, 10 + 2 / 3 + 1 + 2 / 3, 15.0])
    costs.at_position(3)
    assert costs.rows(4) == 12, "before the first measured place it is as there"


def test_what_use_teaches_is_shared_by_all_sequences_of_a_model(llama: adi.Model, measured: list[object]) -> None:
    llama = loaded(llama)
    one, other = cost_model_of(llama, "a").copy(), cost_model_of(llama, "a").copy()
    for _ in range(200):
        one.passed(1, 1.0)
    one.at_position(10)
    other.at_position(500)
    assert other.rows(1) == one.rows(1) == pytest.approx(1.0, rel=0.02)
    assert cost_model_of(llama, "b").rows(1) == 0.5


def test_more_rows_are_never_taken_for_quicker(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = llama.backbone.forward

    def disturbed(rows: Any, lo: int, hi: int) -> Any:
        if len(rows[0].ids) == 2:
            time.sleep(0.2)  # something else ran
        return plain(rows, lo, hi)

    monkeypatch.setattr(llama.backbone, "forward", disturbed)
    seconds = measure(llama.backbone).pass_seconds
    assert seconds[2] == seconds[3] < 0.2
    assert list(seconds.values()) == sorted(seconds.values())


def test_far_into_a_text_too_more_rows_are_never_taken_for_quicker(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = iter(({1: 7.0, 2: 8.0, 3: 8.2, 4: 8.4}, {1: 8.0, 2: 8.4, 3: 8.6, 4: 8.8}))
    monkeypatch.setattr(module, "_passes", lambda backbone, past, draft: (next(tables), []))
    monkeypatch.setattr(llama.backbone, "spec", replace(llama.backbone.spec, context=8192))
    costs = measure(llama.backbone)
    for length in (10, 600, 2048, 8192):
        costs.at_position(length)
        seconds = [costs.rows(count) for count in range(1, 17)]
        assert seconds == sorted(seconds)


def test_a_small_memory_is_measured_as_far_as_it_goes(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = module._passes

    def small(backbone: Any, past: int, draft: Any) -> Any:
        if past > module.PAST:
            raise MemoryFullError("no block is free")
        return plain(backbone, past, draft)

    monkeypatch.setattr(module, "_passes", small)
    monkeypatch.setattr(llama.backbone, "spec", replace(llama.backbone.spec, context=8192))
    costs = measure(llama.backbone)
    assert costs.position_seconds == {}
    assert set(costs.pass_seconds) == set(module.ROWS)


def test_a_slow_moment_is_forgotten_by_what_it_kept_from_being_tried() -> None:
    costs = CostModel({1: 1.0, 2: 1.1, 8: 1.5}, 0.5, 0.25)
    for _ in range(30):
        costs.passed(8, 3.0)
        costs.passed(1, 2.0)
        costs.drafted(1.0, first=False)
    assert costs.rows(8) > 2.5
    for _ in range(600):
        costs.passed(1, 1.0)
        costs.drafted(0.5)
    assert costs.rows(8) == pytest.approx(1.5, rel=0.1)
    assert costs.drafting(2) == pytest.approx(0.75, rel=0.1)


def test_a_slower_machine_is_learned_from_passes_of_any_number_of_rows_and_each_number_apart() -> None:
    costs = CostModel({1: 1.0, 4: 1.2, 8: 1.6})
    for _ in range(300):
        costs.passed(2, 2 * 1.1)
        costs.passed(8, 3 * 1.6)
    assert costs.rows(2) == pytest.approx(2.13, rel=0.05)
    assert costs.rows(8) == pytest.approx(4.8, rel=0.05)
    assert 1.2 < costs.rows(1) < 3, "never seen: by what the others have in common"


@given(
    st.dictionaries(st.integers(1, 16), st.floats(0.1, 50.0), min_size=1, max_size=6),
    st.dictionaries(st.integers(1, 16), st.floats(0.0, 0.1), max_size=4),
    st.lists(st.tuples(st.integers(1, 20), st.floats(0.01, 90.0), st.integers(1, 900)), max_size=12),
)
def test_what_is_kept_for_some_rounds_is_near_what_it_would_be_worked_out_to(table, each, used) -> None:
    costs = CostModel(table, 0.5, 0.25, each)
    for rows, seconds, length in used:
        costs.at_position(length)
        for count in (rows, 1, 17, 40, 2):
            further = module.interpolate(each, count) * max(0, length - module.PAST) if each else 0.0
            plain = module.interpolate(table, count) + further
            wanted, moved = plain * costs.correction.of(count), module.MOVED * module.interpolate(each, count) if each else 0.0
            near = 0.1 * wanted + moved * costs.correction.of(count) + 1e-9  # a kept correction, and a kept position
            assert costs.rows(count) == pytest.approx(wanted, rel=0, abs=near)
        costs.passed(rows, seconds)
        costs.drafted(seconds, first=bool(rows % 2))
        first, later = (costs.correction.of_step(name) for name in (module.FIRST, module.FURTHER))
        assert costs.drafting(3) == pytest.approx(0.5 * first + 2 * 0.25 * later)


def test_the_table_is_read_once_for_a_model_and_not_for_every_generation(
    llama: adi.Model, measured: list[object], tmp_path: Path
) -> None:
    model = loaded(llama)
    cost_model_of(model)
    shutil.rmtree(tmp_path / "costs")
    assert cost_model_of(model).rows(1) == 0.5
    assert len(measured) == 1


def test_measuring_and_compiling_are_not_counted_as_time_of_the_first_generation(
    llama: adi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(backbone: object, draft: object = None) -> CostModel:
        time.sleep(0.5)
        return CostModel({1: 1.0, 4: 1.1})

    monkeypatch.setattr(module, "measure", slow)
    monkeypatch.setattr(llama.backbone, "prepare", lambda *_, **__: time.sleep(0.5))
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))
    before = time.perf_counter()
    text = adi.generate(loaded(llama), [1, 2], adi.Verified(), max_new_tokens=2)
    assert text.counters.seconds < time.perf_counter() - before - 0.9
    assert text.steps[-1].seconds <= text.counters.seconds


class Yielding(dict[int, float]):
    """Lets other threads run whenever it is written to."""

    def __setitem__(self, key: int, value: float) -> None:
        time.sleep(0)
        super().__setitem__(key, value)


def test_threads_may_teach_one_correction_at_once() -> None:
    """Six, of which each adds numbers of rows that the others have not."""
    correction = CostCorrection(own=Yielding())

    def use(number: int) -> None:
        for i in range(40):
            correction.passed(1 << 40 * number + i, 1.1)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(6)))
    assert correction.common == pytest.approx(6 * 40 * 0.1 * math.log(1.1))
