"""A turn of a looped model is a block to the frontier: it may be split, drafted from, verified and cut back as any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adi
from adi.decoding.frontier import Frontier
from adi.errors import AdiError
from adi.model.backbone import Loop, Rows
from adi.model.looped import LoopedConfig, LoopedForCausalLM

FORMS: dict[str, dict[str, Any]] = {
    "concat": {},
    "add": {"injection": "add"},
    "two blocks a turn": {"injection": "add", "core_layers": 2},
    "shaped like Ouro": {"injection": "none", "core_layers": 3},
    "two states, as in TRM": {"states": 2, "inner_turns": 2, "injection": "add"},
    "a prelude before": {"prelude_layers": 2, "injection": "none"},
    "a coda behind": {"coda_layers": 1},
}
IDS = (1, 2, 3, 4, 5, 6, 1, 2)


def network(form: str) -> LoopedForCausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 4}
    model = LoopedForCausalLM(LoopedConfig(**{**sizes, **FORMS[form]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def greedy(model: LoopedForCausalLM, ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return tuple(model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist())


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_turns_are_found_by_watching(form: str) -> None:
    config, spec = network(form).config, adi.load(network(form)).backbone.spec
    assert spec.loop == Loop(config.prelude_layers, 1, 4)
    assert spec.layers == config.prelude_layers + 4 + config.coda_layers
    assert spec.stops == tuple(range(1, spec.layers + 1))


def test_any_split_gives_the_models_own_logits(form: str) -> None:
    model = network(form)
    backbone = adi.load(model).backbone
    for split in backbone.spec.stops[:-1]:
        with backbone.new_cache() as cache:
            (early,) = backbone.forward([Rows(cache, 0, IDS, None)], 0, split)
            (late,) = backbone.forward([Rows(cache, 0, IDS, early)], split, backbone.spec.layers)
        assert torch.allclose(backbone.logits(late), model(torch.tensor([IDS])).logits[0], atol=1e-4)


def test_logits_at_a_turn_are_the_heads_of_that_turn() -> None:
    model = network("concat")
    backbone, every = adi.load(model).backbone, model(torch.tensor([IDS]), output_turns=True)
    with backbone.new_cache() as cache:
        for turn in (1, 2, 4):
            (states,) = backbone.forward([Rows(cache, 0, IDS, None)], 0, turn)
            assert torch.allclose(backbone.logits(states), every.turn_logits[turn - 1, 0], atol=1e-4)


@settings(max_examples=12)
@given(st.sampled_from(sorted(FORMS)), st.lists(st.tuples(st.sampled_from("arl"), st.integers(1, 4)), max_size=12))
def test_random_orders_are_one_full_pass(form: str, orders: list[tuple[str, int]]) -> None:
    """Append, roll back and look at any turn in any order: the last states are those of one pass over the text."""
    model = network(form)
    backbone = adi.load(model).backbone
    frontier, text = Frontier(backbone), list(IDS)
    frontier.append(tuple(IDS))
    for what, n in orders:
        if what == "a":
            text += range(n)
            frontier.append(tuple(range(n)))
        elif what == "r" and len(text) > n:
            del text[-n:]
            frontier.rollback(len(text))
        else:
            frontier.advance(min(n, backbone.spec.layers))
    frontier.advance(backbone.spec.layers)
    wanted = model(torch.tensor([text])).logits[0, -1]
    assert torch.allclose(backbone.logits(frontier.last_state(len(text) - 1))[-1], wanted, atol=1e-3)


def test_drafts_from_a_turn_are_verified_at_all(form: str) -> None:
    """Speculation kicked off from the turn at which an exit fired; the text is the model's own."""
    model = network(form)
    loaded = adi.load(model)
    exits = adi.bare_exits(loaded, range(1, loaded.backbone.spec.layers))
    wanted = greedy(model, IDS, 24)
    for policy in (
        adi.FullDepth(),
        adi.Verified(),
        adi.Verified(exits, trigger=adi.Always((exits.depths[0],)), draft_tokens=4),
        adi.Verified(exits, trigger=adi.Threshold("top_probability", dict.fromkeys(exits.depths, 0.4)), draft_tokens=3),
        adi.Lookup(),
    ):
        assert adi.generate(loaded, IDS, policy, max_new_tokens=24).token_ids == wanted, policy


def test_a_batch_is_each_alone() -> None:
    loaded = adi.load(network("concat"))
    exits = adi.bare_exits(loaded, (1, 2, 3))
    policy = adi.Verified(exits, trigger=adi.Always((1,)), draft_tokens=3)
    prompts = [tuple((i * k + 1) % 32 for i in range(5)) for k in range(12)]
    together = adi.generate_batch(loaded, prompts, policy, max_new_tokens=10)
    for prompt, found in zip(prompts, together, strict=True):
        assert found.token_ids == adi.generate(loaded, prompt, adi.FullDepth(), max_new_tokens=10).token_ids


def test_reflex_stops_at_turns_of_its_own() -> None:
    loaded = adi.load(network("concat"))
    exits = adi.bare_exits(loaded, (1, 2, 3))
    for skipped in ("exact", "propagate"):
        found = adi.generate(
            loaded, IDS, adi.Reflex(exits, trigger=adi.Threshold("top_probability", 0.3), skipped=skipped), max_new_tokens=24
        )
        assert len({step.depth for step in found.steps}) > 1
    two = adi.load(network("two blocks a turn"))
    policy = adi.Reflex(adi.bare_exits(two, (1, 2, 3)), thresholds=0.3, skipped="propagate")
    with pytest.raises(AdiError, match="exact"):
        adi.generate(two, IDS, policy, max_new_tokens=9)


def test_what_feeds_the_input_into_every_turn_behind_a_prelude_is_refused() -> None:
    """The turn's other input, what the prelude gave, is no part of the state that is stored."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 4}
    model = LoopedForCausalLM(LoopedConfig(**sizes, prelude_layers=1)).eval()
    with pytest.raises(AdiError, match="something else happens between block 0 and block 1"):
        adi.load(model)
