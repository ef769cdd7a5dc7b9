"""What halts leaves the pass, and the answers are those of the slow twin that runs all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adi.decoding.looped.halting import Halted, Rule, Standing, inputs_of, run_halting
from adi.errors import UsageError
from looped import gated, ids


@torch.no_grad()
def run_masked(model: Any, ids_BT: torch.Tensor, rule: Rule) -> Halted:
    """The slow twin: from one start, by running every row through every turn and keeping the state of what has halted."""
    decoder, config = model.model, model.config
    given_BTD, attention = inputs_of(model, ids_BT)
    state = decoder.first_state(given_BTD)
    logits = torch.zeros(*ids_BT.shape, config.vocab_size)
    turns, open_BT = torch.zeros_like(ids_BT), torch.ones_like(ids_BT, dtype=torch.bool)
    standing = Standing(rule)
    for turn in range(1, rule.most + 1):
        new = decoder.turn(state, given_BTD, 0, **attention)
        state = torch.where(open_BT[..., None], new, state)
        read = decoder.read_out(state, 0, attention)
        logits = torch.where(open_BT[..., None], model.lm_head(read).float(), logits)
        turns = torch.where(open_BT, turn, turns)
        stops = standing.now(rule.chance(model, read), logits.argmax(-1))
        open_BT = open_BT & ~(stops if config.causal else stops[:, None])
    return Halted(logits, turns)


@settings(max_examples=25)
@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([0.3, 0.5, 0.6, 0.99]),
)
def test_leaving_the_pass_changes_nothing(
    causal: bool, verified: bool, coda: bool, seed: int, count: int, length: int, threshold: float
) -> None:
    model = gated(causal, seed, coda_layers=int(coda and not causal))
    ids_BT, rule = ids(count, length, seed), Rule(threshold, 6, verified=verified)
    fast, slow = run_halting(model, ids_BT, rule), run_masked(model, ids_BT, rule)
    assert torch.equal(fast.turns_BT, slow.turns_BT)
    assert torch.allclose(fast.logits_BTV, slow.logits_BTV, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_many_items_are_each_alone(causal: bool) -> None:
    model, ids_BT, rule = gated(causal, 2), ids(16, 10), Rule(0.6, 6)
    together = run_halting(model, ids_BT, rule)
    for i in range(16):
        alone = run_halting(model, ids_BT[i : i + 1], rule)
        assert torch.equal(alone.turns_BT[0], together.turns_BT[i])
        assert torch.allclose(alone.logits_BTV[0], together.logits_BTV[i], atol=1e-4)
    assert len(together.turns_BT.unique()) > 1


def test_a_verified_item_halts_once_the_turn_after_has_repeated_its_answer() -> None:
    model, ids_BT, asked_BT = gated(False, 3), ids(24, 3), torch.tensor([[True, True, False]]).expand(24, 3)
    every = model(ids_BT, output_turns=True)
    chance_RB = every.halt_logits.mean(-1).sigmoid()
    answers_RBT = every.turn_logits.argmax(-1) * asked_BT
    found = run_halting(model, ids_BT, Rule(0.5, 6, verified=True), asked_BT)
    plain = run_halting(model, ids_BT, Rule(0.5, 6))
    for item in range(24):
        fires = [t for t in range(1, 6) if chance_RB[t - 1, item] > 0.5]
        stands = [t + 1 for t in fires if torch.equal(answers_RBT[t - 1, item], answers_RBT[t, item])]
        assert found.turns_BT[item].tolist() == [stands[0] if stands else 6] * 3
    assert (found.turns_BT > plain.turns_BT).any()
    assert len(found.turns_BT.unique()) > 2


def test_the_first_start_to_halt_wins_and_all_of_its_item_leave() -> None:
    model, starts, noise = gated(False, 5), 4, torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    ids_BT, rule = ids(12, 5), Rule(0.55, 6, starts=starts)
    rows: list[int] = []
    model.model.turn.layers[0].mlp.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    raced = run_halting(model, ids_BT.repeat_interleave(starts, 0), rule, noise_BTD=noise.repeat(12, 1, 1))
    assert sum(rows) == starts * int(raced.turns_BT[:, 0].sum())
    assert raced.start_B is not None
    for item in range(12):
        alone = [run_halting(model, ids_BT[item : item + 1], Rule(0.55, 6), noise_BTD=noise[k : k + 1]) for k in range(starts)]
        turns = [int(each.turns_BT[0, 0]) for each in alone]
        won = int(raced.start_B[item])
        assert turns[won] == min(turns) == int(raced.turns_BT[item, 0])
        assert torch.allclose(alone[won].logits_BTV[0], raced.logits_BTV[item], atol=1e-5)
    assert len(raced.start_B.unique()) > 1


@pytest.mark.parametrize("causal", [True, False])
def test_a_gate_that_never_halts_runs_all_turns(causal: bool) -> None:
    model, ids_BT = gated(causal), ids(3, 8)
    never = run_halting(model, ids_BT, Rule(1.0, 6))
    assert (never.turns_BT == 6).all()
    assert torch.allclose(never.logits_BTV, model(ids_BT).logits, atol=1e-4)
    assert torch.equal(run_halting(model, ids_BT, Rule(None, 6)).logits_BTV, model(ids_BT).logits)


def test_halted_places_cost_nothing_more() -> None:
    model = gated(True)
    rows: list[int] = []
    model.model.turn.layers[0].mlp.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    found = run_halting(model, ids(4, 10), Rule(0.5, 6))
    assert sum(rows) == int(found.turns_BT.sum())


@pytest.mark.parametrize(
    "form", [{"coda_layers": 1}, {"core_layers": 2}, {"states": 2}, {"prelude_layers": 1}, {"turn_norm": "final"}]
)
def test_forms_of_which_no_place_can_leave_are_refused(form: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="turn_norm is 'final'" if "turn_norm" in form else "halt=False"):
        run_halting(gated(True, **form), ids(1, 4), Rule(0.5, 6))
