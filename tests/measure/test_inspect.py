"""Measurements against slow twins, and end to end on a tiny model."""

from __future__ import annotations

import random

import pytest
import torch

import adi
from adi.measure.forced_pass import Text, answer, forced_pass
from adi.measure.inspect import ceiling, speedup
from adi.measure.trigger_study.cost import Cost, measure_cost
from adi.measure.trigger_study.exit_table import signals_of
from conftest import random_exits


@pytest.mark.parametrize(("a", "k"), [(0.0, 3), (0.5, 1), (0.8, 4), (1.0, 6)])
def test_the_speedup_formula_is_what_a_simulation_finds(a: float, k: int) -> None:
    dice, tokens, rounds = random.Random(0), 0, 20_000
    for _ in range(rounds):
        accepted = next((i for i in range(k) if dice.random() >= a), k)
        tokens += accepted + 1
    cost = rounds * (k * 0.2 + 1.1)
    assert speedup(a, k, 0.2, 1.1) == pytest.approx(tokens / cost, rel=0.02)


def test_the_ceiling_picks_the_best_draft_length() -> None:
    cost = Cost((1, 2, 4, 8), (1e-3, 1e-3, 1e-3, 1.1e-3), (1e-2, 1e-2, 1e-2, 1.1e-2), (2e-3, 2e-3, 2e-3, 2.2e-3))
    eager, shy = ceiling(cost, 10, 2, 0.95), ceiling(cost, 10, 2, 0.05)
    assert eager.draft_tokens > shy.draft_tokens == 1
    assert eager.speedup > 1 > shy.speedup
    assert ceiling(cost, 10, 9, 0.9).speedup < ceiling(cost, 10, 1, 0.9).speedup


def test_a_walk_shows_the_states_of_the_answer_rows(tiny_model: adi.Model) -> None:
    text = answer(tiny_model, "hello", 8)
    seen = forced_pass(tiny_model, text, (2, 4))
    assert tuple(seen.token_N.tolist()) == text.ids[text.start :], "the answer is greedy"
    hf = tiny_model.backbone.model  # type: ignore[attr-defined]
    with torch.no_grad():
        states = hf(torch.tensor([text.ids]), output_hidden_states=True).hidden_states
    rows = slice(text.start - 1, len(text.ids) - 1)
    torch.testing.assert_close(seen.at[4].hidden_TD, states[4][0, rows], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.at[4].before_TD, states[3][0, rows], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["entropy", "stability", "hoyer"])
def test_looks_tell_what_a_full_pass_shows(tiny_model: adi.Model, kind: str) -> None:
    """Readings are lazy, so what a trace holds may be worked out after the frontier has gone deeper: it must not show."""
    for exits in (adi.bare_exits(tiny_model, (2, 4)), random_exits(tiny_model, (2, 4), adi.Never())):
        rule = adi.Threshold(kind, {2: 99.0 if kind == "entropy" else 0.5, 4: 0.0})
        got = adi.generate(tiny_model, "hello", adi.Verified(exits, rule), max_new_tokens=20, candidates=3, stop_at_eos=False)
        seen = forced_pass(tiny_model, Text(got.prompt_ids + got.token_ids, len(got.prompt_ids)), exits.depths)
        read = exits.reader(tiny_model.backbone)
        looks = 0
        for step in got.steps:
            for look in step.looks[:-1]:
                states = seen.at[look.depth]
                wanted = signals_of(read(look.depth, states.hidden_TD), states)
                assert look.signals == pytest.approx({n: float(v[step.index]) for n, v in wanted.items()}, abs=1e-4)
                looks += 1
        assert looks > 10


def test_inspect_reports_cost_agreement_and_ceiling(tiny_model: adi.Model) -> None:
    told: list[tuple[int, int]] = []
    found = adi.inspect(tiny_model, ["hello", "the fox"], max_new_tokens=8, progress=lambda a, b: told.append((a, b)))
    assert told == [(1, 2), (2, 2)]
    assert list(found.agreement) == [1, 2, 3, 4, 5]
    assert all(0 <= share <= 1 for share in found.agreement.values())
    assert found.cost.rows == (1, 2, 4, 8)
    assert all(s > 0 for s in found.cost.blocks_seconds + found.cost.block_seconds + found.cost.head_seconds)
    assert "x" in found.advice
    bare = adi.bare_exits(tiny_model, (5,))
    text = answer(tiny_model, "hello", 8)
    seen = forced_pass(tiny_model, text, (5,))
    read = bare.reader(tiny_model.backbone)(5, seen.at[5].hidden_TD)
    alone = adi.inspect(tiny_model, ["hello"], max_new_tokens=8)
    assert alone.agreement[5] == pytest.approx(float((read.log_probs_TS.argmax(-1) == seen.token_N).float().mean()))


def test_cost_of_a_single_row_count(tiny_model: adi.Model) -> None:
    cost = measure_cost(tiny_model.backbone, rows=(1,), repeats=3)
    assert cost.full_seconds == cost.blocks_seconds[0] + cost.head_seconds[0]
