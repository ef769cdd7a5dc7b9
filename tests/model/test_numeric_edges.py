"""Numbers at the edge: NaN, infinity, nothing to choose from, everything alike. A sentence or a defined result, never a token
that nobody chose."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as t
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

import adi
from adi.decoding.sampler import Sampler, distribution, draw
from adi.decoding.sampling import Sampling
from adi.exits.exit_output import ExitOutput
from adi.exits.heads import predict, shortlist
from adi.exits.probe import HEAD_FEATURES
from adi.exits.signals import SIGNALS, HeadRows, Prediction, entropy, lumped_entropy, margin, top_probability
from adi.model.backbone import States
from adi.risk import bounds as calibration
from conftest import exits_with_drafter, random_exits, random_probe
from families import KV, C, tiny

NAN, INF = math.nan, math.inf
IDS = (5, 17, 9)
NO_DISTRIBUTION = r"hold.? no distribution"
SAMPLED = {"temperature": 0.9, "seed": 3}


def broken(scale: float, only: int | None = None) -> adi.Model:
    """A model whose head gives NaN or infinity for one token, or for all."""
    model = copy.deepcopy(tiny("llama"))
    loaded = adi.load(model)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[slice(None) if only is None else slice(only, only + 1)] *= scale
    return loaded


@pytest.mark.parametrize(("scale", "only"), [(NAN, None), (NAN, 0), (NAN, 64), (NAN, 127), (INF, None)])
def test_logits_that_are_none_are_an_error_in_every_mode(scale: float, only: int | None) -> None:
    model = broken(scale, only)
    told: list[Callable[[], Any]] = [
        *(
            lambda o=o: adi.generate(model, IDS, adi.FullDepth(), max_new_tokens=3, **o)
            for o in ({}, SAMPLED, {"repetition_penalty": 1.2})
        ),
        *(lambda p=p: adi.generate(model, IDS, p, max_new_tokens=3) for p in (adi.Verified(), adi.Lookup())),
        lambda: adi.generate_batch(model, [IDS, IDS], adi.FullDepth(), max_new_tokens=3),
    ]
    for forced_read in told:
        with pytest.raises(ValueError, match=NO_DISTRIBUTION):
            forced_read()


def test_states_that_are_none_are_an_error_on_the_compiled_engine() -> None:
    pytest.importorskip("openvino")
    from adi.model.openvino import export_and_open

    backbone = export_and_open(tiny("llama"), name="llama", precision="fp32")
    good = torch.ones(3, backbone.spec.width)
    assert len(backbone.greedy(good)) == 3
    for row in range(3):
        for value in (NAN, INF):
            bad = good.clone()
            bad[row, 5] = value
            with pytest.raises(ValueError, match=NO_DISTRIBUTION):
                backbone.greedy(bad)
    assert backbone.greedy(good) == backbone.greedy(good[:1]) * 3  # and the engine goes on working


def test_an_exit_that_says_nan_is_never_believed_by_a_rule_and_never_speaks() -> None:
    """A rule over its signals stays silent, so full depth decides; believed blindly it is an error, not a token."""
    model = adi.load(tiny("llama"))
    exits = random_exits(model, (2, 4), adi.Threshold("entropy", 99.0))
    assert exits.heads is not None
    bad = {d: replace(a, tail_bias=torch.tensor([NAN])) for d, a in exits.heads.adapters.items()}
    exits = replace(exits, heads=replace(exits.heads, adapters=bad))
    full = adi.generate(model, IDS, adi.FullDepth(), max_new_tokens=6).token_ids
    for rule in (adi.Threshold("entropy", 99.0), adi.Threshold("margin", -9.0), adi.Threshold("top_probability", 0.0)):
        for policy in (adi.Reflex(exits, trigger=rule), adi.Verified(exits, trigger=rule)):
            assert adi.generate(model, IDS, policy, max_new_tokens=6).token_ids == full
    for policy in (adi.Reflex(exits, trigger=adi.Always((2,))), adi.Verified(exits, trigger=adi.Always((4,)))):
        with pytest.raises(ValueError, match=r"the exit at depth [24] holds no distribution"):
            adi.generate(model, IDS, policy, max_new_tokens=6)
    with pytest.raises(ValueError, match=NO_DISTRIBUTION):
        adi.generate(model, IDS, adi.Reflex(exits, trigger=adi.Always((2,))), max_new_tokens=6, **SAMPLED)


def test_a_drafter_that_says_nan_is_an_error() -> None:
    model = adi.load(tiny("llama"))
    exits = exits_with_drafter(model)
    assert exits.drafter is not None
    exits = replace(exits, drafter=replace(exits.drafter, tail_bias=torch.tensor([NAN])))
    with pytest.raises(ValueError, match="the drafter holds no distribution"):
        adi.generate(model, IDS, adi.Static(exits, 0, 2), max_new_tokens=6)


@pytest.mark.parametrize("name", SIGNALS)
def test_no_rule_believes_nan(name: str) -> None:
    for threshold in (-INF, -1.0, 0.0, 1.0, INF):
        assert not adi.Threshold(name, threshold).fires({name: NAN}, 3)
        assert not adi.Weighted({name: 1.0}, 0.0, threshold if threshold != -INF else 0.0).fires({name: NAN}, 3)
    assert not adi.AllOf((adi.Threshold(name, 0.0), adi.Always((3,)))).fires({name: NAN}, 3)


def test_an_infinite_entropy_is_the_least_sure() -> None:
    assert not adi.Threshold("entropy", 1e300).fires({"entropy": INF}, 2)
    assert adi.Threshold("entropy", INF).fires({"entropy": INF}, 2)  # asked to believe anything
    assert not adi.Weighted({"entropy": -1.0}, 5.0, 1e-9).fires({"entropy": INF}, 2)


@given(
    st.lists(st.one_of(st.floats(-1e4, 1e4), st.just(-INF)), min_size=1, max_size=6),
    st.one_of(st.none(), st.just(-INF), st.floats(-50, 0)),
)
def test_measures_of_impossible_tokens_are_numbers(logits: list[float], tail: float | None) -> None:
    """Tokens, or a whole tail, of probability zero add nothing; only where all are impossible is nothing to be said."""
    if max(logits) == -INF:
        logits[0] = 0.0
    ids = None if tail is None else torch.arange(len(logits))
    said = Prediction(torch.tensor([logits]).log_softmax(-1), ids, None if tail is None else torch.tensor([tail]), 7)
    for measure in (entropy, lumped_entropy, margin, top_probability):
        assert math.isfinite(float(measure(said))), measure
    logs = torch.tensor([logits]).log_softmax(-1)
    second = logs.topk(min(2, len(logits))).values[:, -1]
    rows = HeadRows(logs.argmax(-1), logs.amax(-1), second, torch.tensor([-INF if tail is None else tail]), entropy(said))
    measured = Prediction(logs, torch.arange(len(logits)), rows.tail_T, 7, rows)
    assert math.isfinite(float(lumped_entropy(measured)))
    if tail in (None, -INF):
        assert float(entropy(said)) == pytest.approx(float(entropy(Prediction(logs))), abs=1e-6)


def vocabulary_of_one() -> adi.Model:
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**{**C, **KV, "vocab_size": 1, "bos_token_id": None, "eos_token_id": None})).eval()
    model.generation_config.eos_token_id = None
    return adi.load(model)


def test_a_vocabulary_of_one() -> None:
    model = vocabulary_of_one()
    bare = adi.bare_exits(model, (2, 4))
    exits = random_exits(model, (2, 4), adi.Threshold("entropy", 0.0), size=1)
    rules = [adi.Threshold("margin", 0.5), adi.Threshold("top_probability", 0.5), adi.Threshold("entropy", 0.1)]
    policies = [
        adi.FullDepth(),
        adi.Verified(),
        adi.Lookup(),
        *(adi.Verified(bare, r) for r in rules),
        adi.Reflex(bare, trigger=rules[0]),
    ]
    policies += [
        adi.Verified(exits, draft_tokens=3),
        adi.Verified(exits_with_drafter(model, size=1)),
        adi.Reflex(exits, thresholds=9.0),
    ]
    for policy in policies:
        for options in ({}, SAMPLED, {**SAMPLED, "top_k": 5, "top_p": 0.5, "min_p": 0.5}, {"logprobs": 4}):
            assert adi.generate(model, [0], policy, max_new_tokens=9, **options).token_ids == (0,) * 9


def all_alike() -> adi.Model:
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return adi.load(model)


def test_logits_that_are_all_equal() -> None:
    """The first token is the greedy one, in every mode; drawn, all are; verified draws what full depth draws."""
    model = all_alike()
    bare = adi.bare_exits(model, (2, 4))
    policies = [
        None,
        adi.Verified(),
        adi.Lookup(),
        adi.Verified(bare, adi.Always((2,))),
        adi.Reflex(bare, trigger=adi.Always((2,))),
    ]
    for policy in policies:
        assert adi.generate(model, IDS, policy, max_new_tokens=8).token_ids == (0,) * 8
    drawn = [adi.generate(model, IDS, p, max_new_tokens=40, temperature=1.0, seed=1).token_ids for p in policies[:4]]
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]
    assert len(set(drawn[0])) > 20
    flat = torch.zeros(9)
    for sampling in (Sampling(1.0), Sampling(1e-300), Sampling(1e300), Sampling(1.0, top_k=2), Sampling(1.0, min_p=1.0)):
        assert distribution(flat, sampling).tolist() == [pytest.approx(1 / 9)] * 9  # what ties with the last stays
    assert float(distribution(flat, Sampling(1.0, top_p=1e-9))[0]) == 1.0


@pytest.mark.parametrize("make", [adi.FullDepth, adi.Verified, lambda: adi.Lookup()], ids=["full", "verified", "lookup"])
def test_temperature_zero_is_greedy(make: Any) -> None:
    model, policy = adi.load(tiny("llama")), make()
    greedy = adi.generate(model, IDS, policy, max_new_tokens=20).token_ids
    for options in (
        {"temperature": 0},
        {"temperature": 0.0, "seed": 9},
        {"temperature": 1e-300, "seed": 9},
        {"temperature": 5e-324},
    ):
        assert adi.generate(model, IDS, policy, max_new_tokens=20, **options).token_ids == greedy
    assert adi.generate(model, IDS, policy, max_new_tokens=20, temperature=5.0, seed=9).token_ids != greedy


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(-INF)), min_size=1, max_size=8),
    st.floats(0, 1, exclude_max=True),
    st.data(),
)
def test_every_draw_is_of_a_possible_token(logits: list[float], number: float, data: st.DataObject) -> None:
    if max(logits) == -INF:
        with pytest.raises(ValueError, match=NO_DISTRIBUTION):
            distribution(torch.tensor(logits), Sampling(1.0))
        return
    temperature = data.draw(st.one_of(st.just(0.0), st.floats(5e-324, 1e308)))
    cut = (
        {}
        if temperature == 0
        else {"top_k": data.draw(st.sampled_from([None, 1, 3])), "top_p": data.draw(st.sampled_from([1.0, 1e-9]))}
    )
    p_V = distribution(torch.tensor(logits, dtype=torch.float64), Sampling(temperature, **cut))
    assert float(p_V.sum()) == pytest.approx(1.0)
    token = draw(p_V, number)
    assert float(p_V[token]) > 0
    assert logits[token] > -INF
    if temperature == 0:
        assert logits[token] == max(logits)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_sampler_refuses_what_is_no_distribution(bad: float) -> None:
    logits = torch.tensor([0.0, bad, 1.0])
    none = torch.zeros(1, 4)
    reading = ExitOutput(6, lambda: Prediction(logits[None]), States(none, none), logits_V=logits)
    for sampling in (Sampling(1.0), Sampling(repetition_penalty=1.5), Sampling(1.0, top_k=1)):
        with pytest.raises(ValueError, match=NO_DISTRIBUTION):
            Sampler(sampling)((0,), reading)


def test_heads_and_probes_of_extreme_states_are_numbers_or_never_believed() -> None:
    model = adi.load(tiny("llama"))
    exits = random_exits(model, (2,), adi.Never())
    assert exits.heads is not None
    among, adapter = shortlist(model.backbone.readout(), exits.heads.ids_S), exits.heads.adapters[2]
    probe = random_probe(model.backbone.spec.width, (2,))
    assert HEAD_FEATURES == 6
    for scale in (0.0, 1e-30, 1e18, 1e30, INF, NAN):
        hidden_TD = torch.ones(1, model.backbone.spec.width) * scale
        said = predict(adapter, among, hidden_TD)
        values = {"entropy": float(entropy(said)), "margin": float(margin(said))}
        values |= {n: float(probe.chance(n, 2, hidden_TD, lambda said=said: said)) for n in ("state_probe", "joint_probe")}
        for name, value in values.items():
            assert math.isfinite(value) or not adi.Threshold(name, 0.5).fires({name: value}, 2), (scale, name)


@pytest.mark.parametrize("method", ["betting"])
def test_p_values_at_the_edge(method: str) -> None:
    """All losses alike, all zero, all one, levels at both ends: a number in [0, 1], and no certificate for a risk of one."""
    import numpy as np

    p_value = getattr(calibration, method)
    for losses in (np.zeros(50), np.ones(50), np.full(50, 0.5), np.zeros(1)):
        for level in (1e-9, 0.02, 0.5, 1 - 1e-9):
            p = p_value(losses, level)
            assert 0 <= p <= 1
            assert losses.mean() < level or p > 0.05


def test_steps_of_nan_signals_are_strict_json() -> None:
    """What a trace keeps of such a look is read again."""
    model = broken(1.0)
    generation = adi.generate(model, IDS, adi.FullDepth(), max_new_tokens=1)
    step = structs.replace(generation.steps[0], signals={"entropy": NAN, "margin": INF})
    assert adi.Step.from_json(step.to_json()).signals.keys() == {"entropy", "margin"}
