"""Measurements against slow twins, and end to end on a tiny model."""

from __future__ import annotations

import random

import pytest

import adi
from adi.decoding.teacher_forcing import KnownText, forced_pass, full_tokens, own_answers
from adi.measure.inspect import ceiling, speedup
from adi.measure.trigger_study.exit_table import signals_of
from adi.measure.trigger_study.pass_seconds import PassSeconds
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
    passes = PassSeconds(10, (1, 2, 4, 8), (1e-3, 1e-3, 1e-3, 1.1e-3), (1e-2, 1e-2, 1e-2, 1.1e-2), (2e-3, 2e-3, 2e-3, 2.2e-3))
    eager, shy = ceiling(passes, 2, 0.95), ceiling(passes, 2, 0.05)
    assert eager.draft_tokens > shy.draft_tokens == 1
    assert eager.speedup > 1 > shy.speedup
    assert ceiling(passes, 9, 0.9).speedup < ceiling(passes, 1, 0.9).speedup


@pytest.mark.parametrize("kind", ["entropy", "stability", "hoyer"])
def test_looks_tell_what_a_full_pass_shows(tiny_model: adi.Model, kind: str) -> None:
    """Readings are lazy, so what a trace holds may be worked out after the frontier has gone deeper: it must not show."""
    for exits in (adi.bare_exits(tiny_model, (2, 4)), random_exits(tiny_model, (2, 4), adi.Never())):
        rule = adi.Threshold(kind, {2: 99.0 if kind == "entropy" else 0.5, 4: 0.0})
        got = adi.generate(tiny_model, "hello", adi.Verified(exits, rule), max_new_tokens=20, logprobs=3, stop_at_eos=False)
        text = KnownText.of_answer(got.prompt_ids, got.token_ids)
        (seen,) = forced_pass(tiny_model.backbone, [text], exits.depths, details=True)
        read = exits.reader(tiny_model.backbone)
        looks = 0
        for step in got.steps:
            for look in step.looks[:-1]:
                wanted = signals_of(read(look.depth, seen.hidden[look.depth]), seen, look.depth)
                assert look.signals == pytest.approx({n: float(v[step.index]) for n, v in wanted.items()}, abs=1e-4)
                looks += 1
        assert looks > 10


def test_inspect_reports_cost_agreement_and_ceiling(tiny_model: adi.Model) -> None:
    calls: list[tuple[int, int, str]] = []
    found = adi.inspect(tiny_model, ["hello", "the fox"], max_new_tokens=8, progress=lambda *call: calls.append(call))
    assert calls == [(0, 2, "answers"), (1, 2, "answers"), (2, 2, "answers")]
    assert list(found.agreement) == [1, 2, 3, 4, 5]
    assert all(0 <= share <= 1 for share in found.agreement.values())
    assert found.cost.rows == (1, 2, 4, 8)
    assert all(s > 0 for s in found.cost.blocks_seconds + found.cost.block_seconds + found.cost.head_seconds)
    bare = adi.bare_exits(tiny_model, (5,))
    (given,) = own_answers(tiny_model, ["hello"], 8)
    (seen,) = forced_pass(tiny_model.backbone, [KnownText.of_answer(given.prompt_ids, given.token_ids)], (5,))
    head, full_N = bare.reader(tiny_model.backbone)(5, seen.hidden[5]), full_tokens(tiny_model.backbone, seen.deep_ND)
    alone = adi.inspect(tiny_model, ["hello"], max_new_tokens=8)
    assert alone.agreement[5] == pytest.approx(float((head.log_probs_TS.argmax(-1) == full_N).float().mean()))


def test_the_advice_names_what_pays_on_a_frozen_model(tiny_model: adi.Model) -> None:
    """No exit trigger does, so a ceiling must not be read as a promise."""
    advice = adi.inspect(tiny_model, ["hello"], max_new_tokens=4).advice
    assert "Untrained, the best exit is depth" in advice
    assert "no exit trigger that was measured has paid" in advice
    assert "n-grams of the text" in advice
    assert "drafter (adi tune)" in advice
