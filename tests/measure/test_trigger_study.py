"""The trigger study: what it says of known rows, that it never chooses on the texts it reports, and end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adi
from adi.exits.signals import Prediction
from adi.exits.triggers import trigger_from_json
from adi.measure.trigger_study.exit_table import TEMPERATURES, ExitTable, at_temperatures
from adi.measure.trigger_study.study import combined, isotonic_error, oracle
from adi.measure.trigger_study.threshold_search import GATED, ORACLE, STATIC, SearchData, best_rules
from conftest import probed_exits, random_exits
from support import pass_seconds, time_once

LAYERS = 9


@pytest.fixture(autouse=True, scope="module")
def _time_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        time_once(patch)
        yield


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=20))
def test_the_oracle_looks_row_by_row(rows: list[list[bool]]) -> None:
    depths = (2, 4, 7)
    found = oracle({depth: torch.tensor([row[i] for row in rows]) for i, depth in enumerate(depths)}, LAYERS)
    lasting, first = [], []
    for row in rows:
        lasting.append(next((d for i, d in enumerate(depths) if all(row[i:])), LAYERS))
        first.append(next((d for i, d in enumerate(depths) if row[i]), LAYERS))
    assert found.mean_depth == pytest.approx(sum(lasting) / len(rows))
    assert found.mean_first_depth == pytest.approx(sum(first) / len(rows))
    for depth in (*depths, LAYERS):
        assert found.settled[depth] == pytest.approx(lasting.count(depth) / len(rows))
        assert found.first_right[depth] == pytest.approx(first.count(depth) / len(rows))


def table(right: torch.Tensor, calibrates: torch.Tensor, **signals: torch.Tensor) -> ExitTable:
    none = torch.zeros(len(right), 1)
    return ExitTable(signals, right, calibrates, none[:, 0], none, none)


def test_a_signal_that_never_changes_is_not_blamed_for_bad_calibration() -> None:
    """Equal values get one chance, however they are sorted among themselves."""
    right = torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.4
    assert isotonic_error(torch.ones(4000), table(right, torch.arange(4000) % 2 == 0)) < 0.05


def test_a_combination_learns_from_calibrating_rows_only() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2000, generator=generator)
    right, calibrates = torch.rand(2000, generator=generator) < (2 * a - b).sigmoid(), torch.arange(2000) < 1000
    chance = combined({"a": a, "b": b}, table(right, calibrates))
    assert float((chance - (2 * a - b).sigmoid()).abs().mean()) < 0.05
    turned = torch.where(calibrates, right, ~right)
    assert torch.equal(combined({"a": a, "b": b}, table(turned, calibrates)), chance)


@pytest.mark.parametrize("tail", [True, False])
def test_temperature_against_a_softmax_by_hand(tail: bool) -> None:
    ids = torch.tensor([3, 5, 9]) if tail else None
    logs = torch.tensor([[0.5, 0.2, 0.1], [0.1, 0.1, 0.1], [0.3, 0.3, 0.2]] if tail else [[0.5, 0.3, 0.2]] * 3)
    logs = torch.log(logs / logs.sum(1, keepdim=True) * (0.8 if tail else 1.0))
    head = Prediction(logs, ids, torch.full((3,), math.log(0.2)) if tail else None, 90)
    tokens, places = (torch.tensor([5, 4, 9]), (1, 3, 2)) if tail else (torch.tensor([1, 0, 2]), (1, 0, 2))
    surprise_NG, top_NG = at_temperatures(head, tokens)
    for g, heat in enumerate(TEMPERATURES):
        for n, place in enumerate(places):
            logits = [*logs[n].tolist(), *([math.log(0.2)] if tail else [])]
            weights = [math.exp(x / heat) for x in logits]
            assert float(surprise_NG[n, g]) == pytest.approx(-math.log(weights[place] / sum(weights)), abs=1e-5)
            assert float(top_NG[n, g]) == pytest.approx(max(weights[:3]) / sum(weights), abs=1e-5)
    assert 1.0 in TEMPERATURES


def search_data(turned: bool = False, block: float = 1e-3) -> SearchData:
    """Two exits; the first one's margin tells exactly whether it is right, the others tell nothing."""
    generator = torch.Generator().manual_seed(3)
    rows, each = 30 * 20, 20
    calibrates = torch.arange(rows) < rows // 2
    right = torch.rand(rows, generator=generator) < 0.6
    shown = torch.where(calibrates | torch.tensor(not turned), right, ~right)
    noise = torch.rand(rows, generator=generator)
    shows = {"margin": shown.float(), "top_probability": noise, "stability": noise}
    hides = {"margin": noise, "top_probability": noise, "stability": noise}
    at = {2: table(right, calibrates, **shows), 5: table(noise < 0.1, calibrates, **hides)}
    passes = pass_seconds(LAYERS, (1, 8), 0.0, (block, block), (1e-3, 1e-3))
    seconds = {depth: {"head": 1e-4, "margin": 1e-4, "top_probability": 1e-4, "stability": 1e-5} for depth in (2, 5)}
    marks = [i < 15 for i in range(30)]
    return SearchData(at, [each] * 30, marks, seconds, passes)


def test_the_rule_that_tells_wins_and_comes_with_its_thresholds() -> None:
    found = {one.rule: one for one in best_rules(search_data())}
    assert set(found) == {STATIC, ORACLE, "margin", "top_probability", "stability"}
    best = found["margin"]
    assert best.stops == (2,)
    assert best.accepted_share == 1.0
    assert best.trigger == {"kind": "threshold", "signal": "margin", "at": {"2": 1.0}, "min_depth": 0}
    assert found[ORACLE].trigger is None
    assert found[ORACLE].tokens_per_second >= best.tokens_per_second > found["top_probability"].tokens_per_second
    assert best.ratio > 1
    assert trigger_from_json(json.loads(json.dumps(found[STATIC].trigger))) == adi.Always(found[STATIC].stops)


@pytest.mark.parametrize("high", [False, True])
def test_what_sure_means_is_found_where_a_signal_leaves_it_open(high: bool) -> None:
    data = search_data()
    for rows in data.tables.values():
        margin = rows.signals.pop("margin")
        rows.signals["active_share"] = margin if high else 1 - margin
    seconds = {depth: {**known, "active_share": 1e-5} for depth, known in data.seconds.items()}
    best = {one.rule: one for one in best_rules(replace(data, seconds=seconds))}["active_share"]
    assert best.accepted_share == 1.0
    trigger = trigger_from_json(json.loads(json.dumps(best.trigger)))
    assert isinstance(trigger, adi.Threshold)
    assert trigger.high is high
    sure, unsure = ({"active_share": float(share)} for share in (high, not high))
    assert trigger.fires(sure, 2)
    assert not trigger.fires(unsure, 2)


def test_rules_are_chosen_on_calibrating_texts_only() -> None:
    """A signal that lies on the texts that test is still chosen by what it shows on the others, and found out."""
    honest, lying = ({one.rule: one for one in best_rules(search_data(turned))}["margin"] for turned in (False, True))
    same = ("stops", "chance", "draft_tokens", "calibrating_ratio", "trigger")
    assert all(getattr(honest, name) == getattr(lying, name) for name in same)
    assert lying.accepted_share == 0.0
    assert lying.ratio < 1 < honest.ratio


def check(study: Any, depths: tuple[int, ...], signals: set[str]) -> None:
    assert {(s.depth, s.signal) for s in study.scores} == {(d, n) for d in depths for n in signals}
    for score in study.scores:
        assert score.auroc is None or 0 <= score.auroc <= 1
        assert 0 <= score.calibration_error <= 1
        assert score.microseconds > 0
        assert math.isfinite(score.share_of_block)
    assert [c.depth for c in study.calibrations] == list(depths)
    assert sum(study.oracle.settled.values()) == pytest.approx(1)
    assert {one.rule for one in study.estimates} >= {STATIC, ORACLE, "entropy"}
    assert json.loads(json.dumps(study.to_json()))["scores"]


def test_the_study_scores_every_signal_at_every_depth(tiny_model: adi.Model) -> None:
    prompts = [f"the {n} quick foxes and the dog" for n in range(6)]
    signals = {
        "entropy",
        "margin",
        "top_probability",
        "stability",
        "hoyer",
        "top_energy",
        "active_share",
        "route_margin",
        "weighted",
    }
    exits = random_exits(tiny_model, (2, 5), adi.Never())
    study = adi.study_triggers(tiny_model, exits, prompts[:4], calibrate=prompts[4:], max_new_tokens=12)
    check(study, (2, 5), signals)
    ends = {tail.tokens: tail.auroc for tail in study.tails if tail.depth == 2}
    by_name = {s.signal: s for s in study.scores if s.depth == 2}
    assert ends[304 - 40] == by_name["entropy"].auroc, "all of the tail's tokens: entropy as it is"
    assert min(ends) == 1
    study = adi.study_triggers(tiny_model, probed_exits(tiny_model, (2, 5)), prompts, max_new_tokens=12)
    check(study, (2, 5), signals | {"state_probe", "joint_probe"})
    assert GATED in {one.rule for one in study.estimates}
    for few in (prompts[:3], prompts[:1]):
        with pytest.raises(ValueError, match="at least 4"):
            adi.study_triggers(tiny_model, exits, few)
    with pytest.raises(ValueError, match="0 prompts and 2"):
        adi.study_triggers(tiny_model, exits, [], calibrate=prompts[:2])


def test_the_study_finds_a_signal_that_tells(tiny_model: adi.Model) -> None:
    """Before the last block the head is nearly the model's own, so its probability must say more than chance does."""
    prompts = [f"the {n} quick foxes" for n in range(4)]
    deep = adi.study_triggers(tiny_model, adi.bare_exits(tiny_model, (5,)), prompts, max_new_tokens=32)
    by_name = {s.signal: s for s in deep.scores}
    assert by_name["top_probability"].auroc is not None
    assert by_name["top_probability"].auroc > 0.55
    assert deep.tails == [], "the whole vocabulary: there is no tail"


def test_what_the_study_chose_can_be_used(tiny_model: adi.Model) -> None:
    prompts = [f"the {n} quick foxes" for n in range(4)]
    exits = probed_exits(tiny_model, (2, 5))
    study = adi.study_triggers(tiny_model, exits, prompts, max_new_tokens=8)
    full = adi.generate(tiny_model, "the fox", adi.FullDepth(), max_new_tokens=12)
    for one in study.estimates:
        if one.trigger is not None:
            rule = trigger_from_json(json.loads(json.dumps(one.trigger)))
            policy = adi.Verified(exits, rule, draft_tokens=one.draft_tokens)
            assert adi.generate(tiny_model, "the fox", policy, max_new_tokens=12).token_ids == full.token_ids
            assert adi.Verified(replace(exits, trigger=rule), draft_tokens=2)
