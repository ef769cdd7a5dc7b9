"""Triggers: per depth, with a minimum depth, combined, and through JSON."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adi.exits.signals import SIGNALS
from adi.exits.triggers import AllOf, Always, AnyOf, Never, Threshold, Trigger, Weighted, trigger_from_json, with_thresholds

NUMBER = st.floats(-10, 10)
AT = st.one_of(NUMBER, st.dictionaries(st.integers(1, 9), NUMBER, min_size=1, max_size=4))
SIMPLE = st.one_of(
    st.builds(Threshold, st.sampled_from(list(SIGNALS)), AT, st.integers(0, 9)),
    st.builds(Weighted, st.dictionaries(st.sampled_from(list(SIGNALS)), NUMBER, min_size=1), NUMBER, AT, st.integers(0, 9)),
    st.just(Never()),
    st.builds(lambda at: Always(tuple(at)), st.lists(st.integers(1, 9), min_size=1)),
)
TRIGGERS = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.builds(lambda p: AllOf(tuple(p)), st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda p: AnyOf(tuple(p)), st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=5,
)
VALUES = st.fixed_dictionaries(dict.fromkeys(SIGNALS, NUMBER))


@given(TRIGGERS, VALUES, st.integers(1, 9))
def test_json_keeps_a_trigger(trigger: Trigger, values: dict[str, float], depth: int) -> None:
    again = trigger_from_json(json.loads(json.dumps(trigger.to_json())))
    assert again == trigger
    assert again.fires(values, depth) == trigger.fires(values, depth)


@given(TRIGGERS, VALUES, st.integers(1, 9))
def test_what_may_not_fire_does_not_and_nothing_else_is_read(trigger: Trigger, values, depth: int) -> None:
    only = {name: values[name] for name in trigger.needs}
    assert not trigger.fires(only, depth) or trigger.may_fire(depth)


@given(st.sampled_from(list(SIGNALS)), NUMBER, NUMBER)
def test_a_threshold_means_at_least_as_sure(name: str, value: float, threshold: float) -> None:
    wanted = value <= threshold if name == "entropy" else value >= threshold
    assert Threshold(name, threshold).fires({name: value}, 4) == wanted


def test_thresholds_per_depth_and_a_minimum_depth() -> None:
    trigger = Threshold("margin", {3: 0.5, 6: 0.2}, min_depth=4)
    assert [d for d in range(1, 9) if trigger.may_fire(d)] == [6]
    assert not trigger.fires({"margin": 0.9}, 3)
    assert trigger.fires({"margin": 0.3}, 6)


def test_combinations() -> None:
    sure, stable = Threshold("entropy", 1.0), Threshold("stability", 0.9)
    for entropy, cosine in ((0.5, 0.95), (0.5, 0.1), (2.0, 0.95), (2.0, 0.1)):
        values = {"entropy": entropy, "stability": cosine}
        assert AllOf((sure, stable)).fires(values, 1) == (entropy <= 1 and cosine >= 0.9)
        assert AnyOf((sure, stable)).fires(values, 1) == (entropy <= 1 or cosine >= 0.9)


def test_all_of_asks_in_order_and_stops_at_the_first_refusal() -> None:
    rule = AllOf((Threshold("stability", 0.9), Threshold("entropy", 1.0)))
    assert not rule.fires({"stability": 0.1}, 1), "entropy was not even looked up"


def test_a_weighted_score_is_a_logistic_chance() -> None:
    rule = Weighted({"margin": 2.0, "entropy": -1.0}, 0.5, at=0.7)
    chance = 1 / (1 + math.exp(-(0.5 + 2 * 0.8 - 0.3)))
    assert rule.score({"margin": 0.8, "entropy": 0.3}) == pytest.approx(chance)
    assert rule.fires({"margin": 0.8, "entropy": 0.3}, 1) == (chance >= 0.7)


def test_a_minimum_depth_may_be_left_out_of_json() -> None:
    assert trigger_from_json({"kind": "threshold", "signal": "entropy", "at": 1.0}) == Threshold("entropy", 1.0)


def test_thresholds_by_depth_are_a_copy_in_plain_numbers() -> None:
    at = {np.int64(2): np.float32(0.5)}
    rule = Threshold("margin", at)  # type: ignore[arg-type]
    at.clear()
    assert rule.to_json()["at"] == {"2": 0.5}
    for bad in ({None: 0.5}, {False: 0.5}, {1.5: 0.5}, {2: None}):
        with pytest.raises(ValueError, match="threshold of margin"):
            Threshold("margin", bad)  # type: ignore[arg-type]


def test_nesting_has_an_end() -> None:
    deepest = functools.reduce(lambda rule, _: AllOf((rule,)), range(16), Never())
    with pytest.raises(ValueError, match="nested more than 16 times"):
        AllOf((deepest,))


def test_never() -> None:
    assert not Never().may_fire(3)
    assert Never().needs == ()


def test_other_thresholds() -> None:
    assert with_thresholds(Threshold("entropy", 1.0, 3), {4: 0.2}) == Threshold("entropy", {4: 0.2}, 3)
    with pytest.raises(ValueError, match="AnyOf"):
        with_thresholds(AnyOf((Never(),)), 0.5)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"kind": "sometimes"},
        {"kind": "threshold", "signal": "entropy"},
        {"kind": "threshold", "signal": "entropy", "at": 1.0, "min_depth": 0, "extra": 1},
        {"kind": "threshold", "signal": "hope", "at": 1.0, "min_depth": 0},
        {"kind": "threshold", "signal": "entropy", "at": "low", "min_depth": 0},
        {"kind": "threshold", "signal": "entropy", "at": math.nan, "min_depth": 0},
        {"kind": "threshold", "signal": "entropy", "at": {"deep": 1.0}, "min_depth": 0},
        {"kind": "threshold", "signal": "entropy", "at": 1.0, "min_depth": -1},
        {"kind": "threshold", "signal": "entropy", "at": 1.0, "min_depth": "2"},
        {"kind": "all", "parts": []},
        {"kind": "any", "parts": {"a": 1}},
        {"kind": "weighted", "weights": {}, "bias": 0.0, "at": 0.5, "min_depth": 0},
        {"kind": "weighted", "weights": [1], "bias": 0.0, "at": 0.5, "min_depth": 0},
        {"kind": "weighted", "weights": {"margin": True}, "bias": 0.0, "at": 0.5, "min_depth": 0},
    ],
)
def test_damaged_triggers_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"\w{4,}"):
        trigger_from_json(value)


def test_always_fires_where_it_was_told_to_and_reads_nothing() -> None:
    trigger = Always((4,))
    assert [d for d in range(1, 9) if trigger.may_fire(d)] == [4] == [d for d in range(1, 9) if trigger.fires({}, d)]
    for at in ((), (1.5,), (True,)):
        with pytest.raises(ValueError, match=r"whole number|give at least one"):
            Always(at)
