"""Reflex decoding under watch, driven by a script and by a tiny model: what is checked, corrected, and when it falls back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

import adi
from adi.decoding.records import DriftFound
from adi.decoding.reflex import SpotCheck, disagrees
from conftest import random_exits
from scripted import GUESSES, LAYERS, TRUTH, World, reflex, request
from support import certificate


class Quiet(adi.DriftMonitor):
    """Never alarmed, so that all else can be looked at."""

    def saw(self, loss: float) -> bool:
        super().saw(loss)
        self.alarmed = False
        return False


def spot(share: float, monitor: adi.DriftMonitor) -> SpotCheck:
    return SpotCheck(monitor, share, disagrees)


@given(TRUTH, GUESSES, st.integers(1, 5), st.integers(1, 20))
def test_without_checks_it_is_plain_reflex(truth, guesses, prompt, budget) -> None:
    early = lambda depth, at: guesses[(2 * at + (depth == 6)) % 60]  # noqa: E731
    plain = World(prompt, truth, early).run(reflex(request(prompt, budget)))
    seen = World(prompt, truth, early).run(reflex(request(prompt, budget), spot(0.0, Quiet(0.1))))
    assert [d.token for d in seen[0]] == [d.token for d in plain[0]]
    assert [d.depth for d in seen[0]] == [d.depth for d in plain[0]]
    assert seen[1] == plain[1]


@given(TRUTH, GUESSES, st.integers(1, 5), st.integers(1, 20))
def test_where_all_is_checked_the_text_is_the_truth(truth, guesses, prompt, budget) -> None:
    world = World(prompt, truth, lambda depth, at: guesses[(2 * at + (depth == 6)) % 60])
    checks = spot(1.0, Quiet(0.1))
    said, _, proposed = world.run(reflex(request(prompt, budget), checks))
    assert [d.token for d in said] == truth[:budget]
    assert checks.checked == len(said) - 1
    assert checks.differed == sum(len(d.rejected) for d in said)
    assert proposed == checks.differed + sum(d.draft is not None for d in said)


@given(TRUTH, GUESSES, st.integers(1, 20), st.integers(0, 99))
def test_after_the_fall_every_token_is_verified(truth, guesses, budget, seed) -> None:
    """An exit that is always wrong and always believed: found out soon; from there on the truth of that context follows."""
    wrong = lambda depth, at: (6, 0.9)  # noqa: E731
    monitor = adi.DriftMonitor(0.02, 0.5, seed)
    world = World(2, truth, wrong)
    said, asked, _ = world.run(reflex(request(2, budget), spot(1.0, monitor)))
    assert [d.token for d in said] == truth[:budget], "all are checked, so even before the fall nothing wrong stands"
    assert len(said) == budget
    if budget > 8:
        assert world.fell is not None
        assert monitor.alarmed
    rounds = [d.round for d in said]
    assert sorted(set(rounds)) == list(range(1, [a.to for a in asked].count(LAYERS) + 1)), "a round is a pass to full depth"
    assert rounds == sorted(rounds)
    assert all(a.keep > 0 for a in asked[1:]), "nothing is read again from the beginning"
    assert [a.to for a in asked].count(LAYERS) <= budget


def test_another_sequences_alarm_counts() -> None:
    truth = [1 + i % 5 for i in range(30)]
    monitor = adi.DriftMonitor(0.02)
    monitor.alarmed = True
    world = World(2, truth, lambda depth, at: (6, 0.9))
    said, _, _ = world.run(reflex(request(2, 10), spot(0.0, monitor)))
    assert world.fell == 1
    assert [d.token for d in said] == truth[:10]


@pytest.fixture
def certified(llama: adi.Model) -> adi.Exits:
    """A certificate that does not hold: random heads, believed whatever they say."""
    mine = certificate(fingerprint=llama.backbone.spec.fingerprint, trigger=adi.Always((2,)))
    return replace(random_exits(llama, (2, 4), adi.Never()), certificates=(mine,))


def test_a_certificate_that_does_not_hold_is_found_out_and_said(llama: adi.Model, certified: adi.Exits) -> None:
    policy = adi.Reflex(certified, risk=0.02, spot_check=0.5)
    session = adi.Session(llama, [1, 2, 3], policy, max_new_tokens=60)
    events = list(session)
    (found,) = [e for e in events if isinstance(e, DriftFound)]
    generation = session.generation([e for e in events if isinstance(e, adi.Step)])
    assert generation.drift is not None
    assert generation.drift.fell_back_at == found.index > 0
    assert generation.drift.lower > found.level == 0.02
    assert generation.drift.checked >= generation.drift.differed > 0
    assert generation.certified is None, "it was refuted"
    assert not generation.summary().calibrated
    tail = generation.token_ids[found.index :]
    context = [*generation.prompt_ids, *generation.token_ids[: found.index]]
    assert adi.generate(llama, context, adi.FullDepth(), max_new_tokens=len(tail)).token_ids == tail, (
        "from there on full depth's"
    )
    assert any(step.accepted or step.depth == 6 for step in generation.steps[found.index :])


def test_what_follows_with_the_same_monitor_is_verified_from_the_start(llama: adi.Model, certified: adi.Exits) -> None:
    monitor = adi.DriftMonitor.of(certified.certificates[0], seed=3)
    policy = adi.Reflex(certified, risk=0.02, spot_check=0.5, monitor=monitor)
    adi.generate(llama, [1, 2, 3], policy, max_new_tokens=60)
    assert monitor.alarmed
    again = adi.generate(llama, [7, 8], policy, max_new_tokens=12)
    assert again.token_ids == adi.generate(llama, [7, 8], adi.FullDepth(), max_new_tokens=12).token_ids
    assert again.drift is not None
    assert again.drift.fell_back_at == 0
    assert again.certified is None
    assert again.summary().calibrated, "all of it was verified"
    fresh = adi.Reflex(certified, risk=0.02, spot_check=0.5)
    assert fresh.monitor is not None
    assert not fresh.monitor.alarmed, "a policy of its own starts with a monitor of its own"


def test_a_certificate_that_holds_is_left_alone(llama: adi.Model, certified: adi.Exits) -> None:
    sound = replace(certified, certificates=(structs.replace(certified.certificates[0], trigger=adi.Never()),))
    policy = adi.Reflex(sound, risk=0.02, spot_check=0.3)
    got = adi.generate(llama, [1, 2, 3], policy, max_new_tokens=40)
    assert got.drift is not None
    assert (got.drift.fell_back_at, got.drift.differed) == (None, 0)
    assert got.certified is not None
    assert got.summary().calibrated
    assert got.token_ids == adi.generate(llama, [1, 2, 3], adi.FullDepth(), max_new_tokens=40).token_ids


def test_the_loss_watched_is_the_certificates(llama: adi.Model, certified: adi.Exits) -> None:
    """log_loss: the monitor's mean is the clipped regret of the tokens that were checked, worked out slowly."""
    mine = structs.replace(certified.certificates[0], kind="log_loss", level=0.03, nats=3.0)
    policy = adi.Reflex(replace(certified, certificates=(mine,)), risk=0.03, kind="log_loss", spot_check=1.0)
    assert policy.monitor is not None
    policy.monitor.delta = 1e-300
    session = adi.Session(llama, [1, 2, 3], policy, max_new_tokens=12)
    text, losses = [1, 2, 3], []
    for event in session:
        if not isinstance(event, adi.Step):
            continue
        if len(text) > 3:
            states = adi_states(llama, text)
            logs = llama.backbone.logits(states[-1:]).log_softmax(-1)[0]
            said = event.rejected[0].token if event.rejected else event.token
            losses.append(min(float(logs.max() - logs[said]), 3.0) / 3.0)
        text.append(event.token)
    assert policy.monitor.checked == len(losses)
    assert policy.monitor.mean == pytest.approx(sum(losses) / len(losses), abs=0.011)


def adi_states(model: adi.Model, ids: list[int]):
    from adi.model.backbone import Rows

    backbone = model.backbone
    return backbone.forward([Rows(backbone.new_cache(), 0, tuple(ids), None)], 0, backbone.spec.layers)[0].hidden_TD


def test_a_spot_check_needs_something_to_watch(certified: adi.Exits) -> None:
    with pytest.raises(ValueError, match="watches over a certificate"):
        adi.Reflex(certified, trigger=adi.Never(), spot_check=0.1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        adi.Reflex(certified, risk=0.02, spot_check=1.5)
    with pytest.raises(ValueError, match=r"spot_check is 0.*; give some"):
        adi.Reflex(certified, risk=0.02, monitor=adi.DriftMonitor(0.02))
    with pytest.raises(ValueError, match=r"watches over disagreement at a level of 0\.1"):
        adi.Reflex(certified, risk=0.02, spot_check=0.1, monitor=adi.DriftMonitor(0.1))


def test_batches_share_the_monitor(llama: adi.Model, certified: adi.Exits) -> None:
    policy = adi.Reflex(certified, risk=0.02, spot_check=0.5)
    texts = adi.generate_batch(llama, [[i, i + 1] for i in range(8)], policy, max_new_tokens=20)
    assert all(g.drift is not None and g.drift.fell_back_at is not None for g in texts)


def test_propagated_keys_and_values_are_each_blocks_own_of_the_exit_state(llama: adi.Model) -> None:
    """Block by block by hand: norm, projection, rotation of the exit's state, at every skipped block."""
    from adi.decoding.frontier import Frontier

    hf = llama.backbone.model  # type: ignore[attr-defined]
    frontier = Frontier(llama.backbone)
    frontier.append([1, 2, 3])
    frontier.advance(6)
    frontier.append([4])
    frontier.advance(2)
    state_D = frontier.states(3, 4).hidden_TD[0].clone()
    frontier.propagate()
    assert frontier.filled == [4] * 6
    cos, sin = hf.model.rotary_emb(state_D[None, None], torch.tensor([[3]]))
    for layer in range(2, 6):
        block = hf.model.layers[layer]
        with torch.no_grad():
            x = block.input_layernorm(state_D[None, None])
            key = block.self_attn.k_proj(x).view(1, 1, -1, block.self_attn.head_dim).transpose(1, 2)
            value = block.self_attn.v_proj(x).view(1, 1, -1, block.self_attn.head_dim).transpose(1, 2)
        half = key.shape[-1] // 2
        turned = key * cos[:, None] + torch.cat([-key[..., half:], key[..., :half]], -1) * sin[:, None]
        held = frontier.cache.layers[layer]
        assert torch.allclose(held.keys[..., 3:4, :], turned, atol=1e-5)
        assert torch.allclose(held.values[..., 3:4, :], value, atol=1e-5)
    frontier.append([5])
    frontier.advance(6)
    exact = adi_states(llama, [1, 2, 3, 4, 5])[-1]
    assert not torch.allclose(frontier.states(4, 5).hidden_TD[0], exact, atol=1e-4), "it is an approximation"


def test_propagation_owes_nothing_and_refuses_what_it_cannot_do(llama: adi.Model, certified: adi.Exits) -> None:
    policy = adi.Reflex(certified, trigger=adi.Always((2,)), skipped="propagate")
    text = adi.generate(llama, [1, 2, 3], policy, max_new_tokens=10)
    assert [s.depth for s in text.steps] == [6] + [2] * 9
    exact = adi.generate(llama, [1, 2, 3], adi.Reflex(certified, trigger=adi.Always((2,))), max_new_tokens=10)
    assert text.token_ids == exact.token_ids, "where no token goes deeper, nobody reads what was skipped"
    never = adi.Reflex(certified, trigger=adi.Never(), skipped="propagate")
    assert (
        adi.generate(llama, [1, 2, 3], never, max_new_tokens=10).token_ids
        == adi.generate(llama, [1, 2, 3], adi.FullDepth(), max_new_tokens=10).token_ids
    )
    with pytest.raises(ValueError, match="choose one of exact, propagate"):
        adi.Reflex(certified, trigger=adi.Never(), skipped="guess")
    with pytest.raises(ValueError, match="not for skipped='propagate'"):
        adi.Reflex(certified, risk=0.02, skipped="propagate")


def test_an_engine_that_cannot_propagate_is_refused(
    llama: adi.Model, certified: adi.Exits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(llama.backbone), "can_propagate", False)
    with pytest.raises(ValueError, match="cannot make keys and values"):
        adi.generate(llama, [1, 2], adi.Reflex(certified, trigger=adi.Never(), skipped="propagate"), max_new_tokens=3)


def test_a_certificate_of_greedy_text_is_not_stretched_to_sampled_text(llama: adi.Model, certified: adi.Exits) -> None:
    with pytest.raises(ValueError, match="speaks of the model's plain greedy text"):
        adi.generate(llama, [1, 2, 3], adi.Reflex(certified, risk=0.02), max_new_tokens=2, temperature=1.0)


def test_a_text_that_begins_again_has_the_same_dice_and_its_checks_count_once(llama: adi.Model, certified: adi.Exits) -> None:
    policy = adi.Reflex(certified, risk=0.02, spot_check=0.5, monitor=Quiet(0.02, seed=5))
    assert policy.monitor is not None
    session = adi.Session(llama, [1, 2, 3], policy, max_new_tokens=30)
    first = list(session.steps())
    counts, generations = dict(policy.monitor.counts), policy.monitor.generations
    drift = session.generation(first).drift
    session.restart()
    again = list(session.steps())
    assert [(s.token, s.depth, s.round) for s in again] == [(s.token, s.depth, s.round) for s in first]
    assert session.generation(again).drift == drift
    assert drift is not None
    assert drift.checked > 5
    assert (policy.monitor.counts, policy.monitor.generations) == (counts, generations)


def test_a_text_that_begins_again_falls_back_where_it_did(llama: adi.Model, certified: adi.Exits) -> None:
    session = adi.Session(llama, [1, 2, 3], adi.Reflex(certified, risk=0.02, spot_check=0.5), max_new_tokens=60)
    first = [event for event in session if isinstance(event, (adi.Step, DriftFound))]
    session.restart()
    again = [event for event in session if isinstance(event, (adi.Step, DriftFound))]
    places = [[event.index for event in events if isinstance(event, DriftFound)] for events in (first, again)]
    assert places[0] == places[1] != []
    tokens = [[event.token for event in events if isinstance(event, adi.Step)] for events in (first, again)]
    assert tokens[0] == tokens[1]
