"""The law of several sampled tokens, by 20,000 draws a setting: the full model's, whoever drafts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
import transformers as t

import adi
from adi.decoding.frontier import Frontier
from adi.decoding.reflex import Unverified
from adi.decoding.sampler import distribution
from adi.decoding.sampling import Sampling
from adi.decoding.speculate import Strategy, speculate
from adi.exits.triggers import Always
from conftest import random_drafter, random_exits
from laws import (
    DRAFTERS,
    DRAWS,
    KINDS,
    PROMPT,
    SETTINGS,
    TOKENS,
    Drawn,
    Law,
    Remembering,
    V,
    by_exits,
    cheap,
    early_logits,
    exact,
    full_logits,
    law_after,
    off,
    request,
    sampled,
)


@pytest.mark.parametrize(("kind", "setting"), [(k, s) for k in KINDS for s in SETTINGS if k in DRAFTERS or s == "hot"])
def test_the_law_is_the_full_models_whoever_drafts(kind: str, setting: str) -> None:
    found, drafted, accepted = sampled(KINDS[kind], Remembering(SETTINGS[setting]))
    assert off(found, exact(SETTINGS[setting])) < 1
    if kind != "full depth":
        assert drafted > DRAWS / 5
        assert accepted > drafted / 20
        assert accepted < drafted


def test_reflex_draws_the_exits_own_law() -> None:
    hot = SETTINGS["hot"]
    law: Law = {(): 1.0}
    for _ in range(TOKENS):
        longer: Law = {}
        for said, chance in law.items():
            logits_V = early_logits(2, PROMPT + said) if said else full_logits(PROMPT)
            p_V = distribution(logits_V, hot).tolist()
            longer.update({(*said, x): chance * p for x, p in enumerate(p_V)})
        law = longer

    def reflex(rule: Any) -> Any:
        wanted = request(rule)
        return speculate(wanted, Strategy(by_exits(wanted, Always((2,))), 1, Unverified()))

    found, _, _ = sampled(reflex, Remembering(hot))
    assert off(found, law) < 1
    assert off(found, exact(hot)) > 1.5, "and it is not the full model's"


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_law_is_the_full_models_where_drafts_are_drawn(setting: str) -> None:
    found, drafted, accepted = sampled(Drawn(), Remembering(SETTINGS[setting]))
    assert off(found, exact(SETTINGS[setting])) < 1
    assert drafted / 10 < accepted < 0.95 * drafted


# The same through a real network, small but whole: states, KV memory, heads, rollback.


@pytest.fixture(scope="module")
def small() -> adi.Model:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    network = t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=V, max_position_embeddings=64)).eval()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.8)
    network.generation_config.eos_token_id = None
    return adi.load(network)


def real_law(model: adi.Model, sampling: Sampling, prompt: tuple[int, ...]) -> Law:
    """By one full pass of the whole text for every conditional distribution."""
    law: Law = {(): 1.0}
    for _ in range(TOKENS):
        longer: Law = {}
        for said, chance in law.items():
            with torch.no_grad():
                logits_V = model.backbone.model(torch.tensor([prompt + said])).logits[0, -1]  # type: ignore[attr-defined]
            p_V = law_after(logits_V, prompt + said, sampling).tolist()
            longer.update({(*said, x): chance * p for x, p in enumerate(p_V) if p > 0})
        law = longer
    return law


def policies(model: adi.Model) -> dict[str, adi.Policy]:
    trained = dataclasses.replace(random_exits(model, (1,), adi.Never(), V), drafter=random_drafter(model, V))
    return {
        "exit head": adi.Verified(adi.bare_exits(model, (1,)), adi.Always((1,)), draft_tokens=2),
        "drafter": adi.Verified(trained),
        "memory": adi.Verified(),
        "lookup": adi.Lookup(),
    }


def drawn(model: adi.Model, policy: Any, sampling: Sampling, prompt: tuple[int, ...]) -> tuple[Counter[tuple[int, ...]], int]:
    """Counts of the texts said, and how many drafts were accepted."""
    options = {**sampling.to_json(), "max_new_tokens": TOKENS, "stop_at_eos": False}
    texts = [adi.generate(model, prompt, policy, **{**options, "seed": seed}) for seed in range(NETWORK_DRAWS)]
    return Counter(text.token_ids for text in texts), sum(text.counters.accepted for text in texts)


NETWORK_DRAWS = 500  # a network takes a thousand times as long as the table
STARTS = {"exit head": PROMPT, "drafter": PROMPT, "memory": (4, 4, 4, 4), "lookup": (4, 4, 4, 4)}


@pytest.mark.parametrize("kind", STARTS)
def test_the_law_through_a_real_network(small: adi.Model, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adi.decoding.policies.cost_model_of", lambda *_: cheap())  # its own: use teaches costs
    sampling = Sampling(temperature=1.0, top_k=3, seed=0)
    found, accepted = drawn(small, policies(small)[kind], sampling, STARTS[kind])
    assert off(found, real_law(small, sampling, STARTS[kind])) < 1
    assert accepted > NETWORK_DRAWS / 50


def test_an_off_by_one_in_rollback_is_caught_through_a_real_network(small: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling, rollback = Sampling(temperature=1.0, top_k=3, seed=0), Frontier.rollback
    monkeypatch.setattr(Frontier, "rollback", lambda self, length: rollback(self, min(length + 1, self.length)))
    found, _ = drawn(small, policies(small)["exit head"], sampling, PROMPT)
    assert off(found, real_law(small, sampling, PROMPT)) > 1.2
