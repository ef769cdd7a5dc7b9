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
from adi.decoding.drafting.cost_model import SURE, USUAL, USUAL_STEP, CostCorrection, CostModel, cost_model_of, measure
from adi.errors import MemoryFullError


def loaded(model: adi.Model) -> adi.Model:
    """The same as if loaded once more: nothing is known of it yet."""
    return replace(model, notes={})


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Empty at first."""
    monkeypatch.setenv("ADI_CACHE", str(tmp_path))


def taught(model: adi.Model, key: str = "") -> CostModel:
    """Passes of one row took half a second, a hundred times."""
    costs = cost_model_of(model, key)
    for _ in range(100):
        costs.passed(1, 0.5)
    costs.keep()
    return costs


def test_what_use_teaches_is_kept_for_a_model_and_a_drafter(llama: adi.Model, tmp_path: Path) -> None:
    assert taught(loaded(llama), "a").rows(1) == pytest.approx(0.5, rel=0.01)
    again = cost_model_of(loaded(llama), "a")
    assert again.rows(1) == pytest.approx(0.5, rel=0.01)
    assert not again.correction.unsure(1)
    assert cost_model_of(loaded(llama), "b").correction.unsure(1), "another drafter is another table"
    assert len(list((tmp_path / "costs").iterdir())) == 1


DAMAGED: list[Any] = ["", "{", "[]", "null", {}] + [
    {"common": 0.0, "far": 0.0, "own": {"1": 0.5}, "steps": {}, "timed": {"1": 9}} | wrong
    for wrong in (
        {"own": []},
        {"own": {"one": 0.5}},
        {"own": {"0": 0.5}},
        {"own": {"1": None}},
        {"own": {"1": float("nan")}},
        {"own": {"1": 1e9}},
        {"common": None},
        {"common": float("inf")},
        {"timed": {"1": -1}},
        {"timed": {"1": 0.5}},
        {"steps": {"first": "x"}},
        {"more": 1},
    )
]


@pytest.mark.parametrize("content", DAMAGED, ids=str)
def test_of_a_damaged_table_nothing_is_believed(llama: adi.Model, tmp_path: Path, content: Any) -> None:
    taught(loaded(llama))
    (note,) = (tmp_path / "costs").iterdir()
    note.write_text(content if isinstance(content, str) else json.dumps(content))
    assert cost_model_of(loaded(llama)).correction == CostCorrection(timed={})
    taught(loaded(llama))
    assert cost_model_of(loaded(llama)).rows(1) == pytest.approx(0.5, rel=0.01), "and written anew"


def test_a_cache_that_cannot_be_written_loses_what_was_learned_and_no_more(
    llama: adi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADI_CACHE", str(tmp_path / "file"))
    assert taught(loaded(llama)).rows(1) == pytest.approx(0.5, rel=0.01)
    assert cost_model_of(loaded(llama)).correction.unsure(1)


def test_what_was_never_timed_is_worked_out_from_what_was() -> None:
    """The first pass of a shape makes its kernels and is not counted, the next ones count for much."""
    costs = CostModel.usual(CostCorrection(timed={}))
    unknown = costs.rows(8) / costs.rows(1)
    for seconds in (9.0, 2.0, 2.0):
        costs.passed(1, seconds)
    assert costs.rows(1) == pytest.approx(2.0)
    assert costs.rows(8) == pytest.approx(2.0 * unknown)
    assert costs.drafting(1) == pytest.approx(2.0 * USUAL_STEP / USUAL[1]), "and a step costs its share of a pass"
    for seconds in (9.0, 5.0, 5.0, 5.0):
        costs.passed(8, seconds)
    assert costs.rows(8) == pytest.approx(5.0, rel=0.05)
    assert costs.rows(1) == pytest.approx(2.0, rel=0.1)
    assert costs.rows(1) < costs.rows(4) < costs.rows(8)
    for seconds in (9.0, *[0.5] * 9):
        costs.drafted(seconds)
    assert costs.drafting(1) == pytest.approx(0.5, rel=0.1)


def test_numbers_of_rows_are_sure_that_are_near_what_was_timed() -> None:
    costs = CostModel.usual(CostCorrection(timed={}))
    for _ in range(SURE):
        assert costs.correction.unsure(16)
        costs.passed(16, 1.0)
    assert [rows for rows in range(1, 65) if not costs.correction.unsure(rows)] == list(range(11, 25))
    assert not CostModel({1: 1.0}).correction.unsure(50), "of a table that was measured all is taken as known"


def test_what_positions_add_is_learned_from_long_texts() -> None:
    costs = CostModel.usual(CostCorrection(timed={}))

    def truth(rows: int, length: int) -> float:
        return 0.01 + 0.0005 * rows + 4e-6 * rows * length

    for length in [*range(64, 2000, 2)] * 3:
        costs.at_position(length)
        rows = 1 + length // 2 % 3
        costs.passed(rows, truth(rows, length))
    for length in (1000, 1900):
        costs.at_position(length)
        assert costs.rows(3) - costs.rows(1) == pytest.approx(truth(3, length) - truth(1, length), rel=0.2)


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


def test_what_use_teaches_is_shared_by_all_sequences_of_a_model(llama: adi.Model) -> None:
    llama = loaded(llama)
    one, other = cost_model_of(llama, "a").copy(), cost_model_of(llama, "a").copy()
    for _ in range(200):
        one.passed(1, 1.0)
    assert other.rows(1) == one.rows(1) == pytest.approx(1.0, rel=0.02)
    assert cost_model_of(llama, "b").rows(1) != 1.0


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

    def worked_out(rows: int, length: int) -> float:
        further = module.interpolate(each, rows) * max(0, length - module.PAST) if each else 0.0
        return float((module.interpolate(table, rows) + further) * costs.correction.of(rows))

    for rows, seconds, length in used:
        costs.at_position(length)
        for count in (rows, 1, 17, 40, 2):
            wanted = min(worked_out(more, length) for more in range(count, module.USUAL_ROWS + 1))
            further = max(module.interpolate(each, rows) for rows in (count, module.USUAL_ROWS)) if each else 0.0
            moved = module.MOVED * further * costs.correction.of(count)
            near = 0.1 * wanted + moved + 1e-9  # a kept correction, and a kept position
            assert costs.rows(count) == pytest.approx(wanted, rel=0, abs=near)
        costs.passed(rows, seconds)
        costs.drafted(seconds, first=bool(rows % 2))
        first, later = (costs.correction.of_step(name) for name in (module.FIRST, module.FURTHER))
        assert costs.drafting(3) == pytest.approx(0.5 * first + 2 * 0.25 * later)


def test_the_table_is_read_once_for_a_model_and_not_for_every_generation(llama: adi.Model, tmp_path: Path) -> None:
    model = loaded(llama)
    taught(model)
    shutil.rmtree(tmp_path / "costs")
    assert cost_model_of(model).rows(1) == pytest.approx(0.5, rel=0.01)


def test_no_pass_is_run_to_be_timed(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    forward = llama.backbone.forward

    def counted(rows: Any, lo: int, hi: int, **options: Any) -> Any:
        passes.append(len(rows[0].ids))
        return forward(rows, lo, hi, **options)

    monkeypatch.setattr(llama.backbone, "forward", counted)
    text = adi.generate(loaded(llama), [1, 2], adi.Verified(), max_new_tokens=9, stop_at_eos=False)
    assert len(passes) == text.counters.rounds
    assert passes[: SURE + 1] == [2, *[1] * SURE], "what no drafts cost is known first"


class Yielding(dict[int, float]):
    """Lets other threads run whenever it is written to."""

    def __setitem__(self, key: int, value: float) -> None:
        time.sleep(0)
        super().__setitem__(key, value)


def test_threads_may_teach_one_correction_at_once() -> None:
    """Six, of which each adds numbers of rows that the others have not."""
    correction = CostCorrection(own={1: 0.0}, timed=Yielding({number + i: SURE for number in range(6) for i in (1, 7, 13)}))

    def use(number: int) -> None:
        for i in range(40):
            correction.passed(1 + number + 6 * (i % 3), 1.1)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(6)))
    assert correction.common == pytest.approx(6 * 40 * 0.1 * math.log(1.1))
