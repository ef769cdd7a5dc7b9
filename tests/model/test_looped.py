"""A looped model is an ordinary transformers model: saved, loaded, cached, generated from; its turns are those of its form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adi.errors import UsageError
from adi.model.looped import GATE_BIAS, LoopedConfig, LoopedForCausalLM

FORMS: dict[str, dict[str, Any]] = {
    "concat": {},
    "add, two blocks": {"injection": "add", "core_layers": 2},
    "no injection, no norm": {"injection": "none", "turn_norm": False},
    "prelude and coda": {"prelude_layers": 1, "coda_layers": 1},
    "two states": {"states": 2, "inner_turns": 2, "injection": "add"},
    "learned places": {"positions": "learned", "max_position_embeddings": 16},
}
IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 1, 0], [6, 5, 4, 3, 2, 1, 0, 3]])


def looped(**form: Any) -> LoopedForCausalLM:
    """A tiny one with weights that are not small, so that turns differ."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 4}
    model = LoopedForCausalLM(LoopedConfig(**{**sizes, **form})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_cache_changes_nothing(form: dict[str, Any]) -> None:
    model = looped(**form)
    with torch.no_grad():
        whole = model(IDS).logits
        first = model(IDS[:, :5], use_cache=True)
        rest = model(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-5)
    assert len(first.past_key_values.layers) == model.config.num_hidden_layers


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_it_is_saved_and_loaded_by_the_auto_class(form: dict[str, Any], tmp_path: Path) -> None:
    model = looped(**form)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, LoopedForCausalLM)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_generation_with_a_cache_is_generation_without() -> None:
    model = looped()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, **options, use_cache=False))


def test_fewer_turns_are_the_first_of_many() -> None:
    model = looped()
    every = model(IDS, output_turns=True)
    assert every.turn_logits.shape == (4, 2, 8, 7)
    assert every.halt_logits.shape == (4, 2, 8)
    for turns in (1, 3):
        assert torch.equal(model(IDS, turns=turns).logits, every.turn_logits[turns - 1])
    assert torch.equal(every.logits, every.turn_logits[-1])


def test_only_causal_models_hide_what_comes_later() -> None:
    changed = IDS.clone()
    changed[:, -1] = 2
    for causal in (True, False):
        model = looped(causal=causal)
        assert torch.allclose(model(IDS).logits[:, 0], model(changed).logits[:, 0], atol=1e-6) == causal


def test_a_pass_goes_on_from_the_state_of_another() -> None:
    model = looped()
    with torch.no_grad():
        first = model(IDS, turns=1, output_turns=True)
        rest = model(IDS, turns=3, output_turns=True, state=first.state)
        whole = model(IDS, output_turns=True)
    assert torch.equal(torch.cat([first.turn_logits, rest.turn_logits]), whole.turn_logits)


def test_heads_learn_a_bias_for_what_two_places_share(tmp_path: Path) -> None:
    """By hand: the bias of a pair of places is added to what the head sees between them, before the softmax."""
    features = [[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2, 3]]
    grid: dict[str, Any] = {"causal": False, "positions": "learned", "place_features": features, "max_position_embeddings": 8}
    plain, model = looped(**grid), looped(**grid, relation_bias=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    relations = model.model.turn.layers[0].relations
    with torch.no_grad():
        relations.bias.zero_()
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
        relations.bias.normal_(0, 2)
        moved = model(IDS).logits
        assert not torch.allclose(moved, plain(IDS).logits, atol=1e-3)
        for head in range(2):
            for a in range(8):
                for b in range(8):
                    shared = sum(2**i for i, feature in enumerate(features) if feature[a] == feature[b])
                    assert relations(None)[0, head, a, b] == relations.bias[head, shared]
        first_open = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
        masked = relations(first_open)
        assert masked.shape == (2, 2, 8, 8)
        assert bool((masked[~first_open.expand_as(masked)] < -1e30).all())
        torch.testing.assert_close(relations(torch.where(first_open, 0.0, -1e38))[0].tril(), masked[0].tril())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, moved)


def test_relations_start_at_their_own_scale() -> None:
    features = [list(range(200)), [n % 8 for n in range(200)]]
    grid: dict[str, Any] = {"causal": False, "place_features": features, "relation_bias": True, "num_attention_heads": 48}
    for scale in (0.0, 2.0):
        model = LoopedForCausalLM(LoopedConfig(**grid, relation_range=scale))
        assert float(model.model.turn.layers[0].relations.bias.detach().std()) == pytest.approx(scale, rel=0.2)


def test_embeddings_start_at_their_own_scale() -> None:
    model = LoopedForCausalLM(LoopedConfig(vocab_size=500, embedding_range=1.0))
    assert float(model.model.embed_tokens.weight.detach().std()) == pytest.approx(1.0, rel=0.05)
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    placed = LoopedForCausalLM(LoopedConfig(vocab_size=500, positions="learned", embedding_range=1.0, place_range=0.05))
    assert float(placed.model.embed_tokens.weight.detach().std()) == pytest.approx(1.0, rel=0.05)
    assert float(placed.model.embed_positions.tables[0].weight.detach().std()) == pytest.approx(0.05, rel=0.05)


def test_a_gate_starts_unwilling_and_may_take_the_price() -> None:
    model = looped(gate_price=True)
    fresh = LoopedForCausalLM(LoopedConfig(vocab_size=7))
    assert float(fresh(IDS, output_turns=True).halt_logits.mean()) == pytest.approx(GATE_BIAS)
    low, high = (model(IDS, output_turns=True, price=price).halt_logits for price in (0.001, 1.0))
    assert not torch.equal(low, high)
    with pytest.raises(UsageError, match="range of prices"):
        model(IDS, output_turns=True)


def test_labels_are_the_next_token_or_the_answer_at_the_place() -> None:
    labels = IDS.clone()
    labels[0, 3] = -100
    for shifted in (True, False):
        model = looped(shifted_labels=shifted)
        out = model(IDS, labels=labels)
        logits, wanted = (out.logits[:, :-1], labels[:, 1:]) if shifted else (out.logits, labels)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        assert float(out.loss) == pytest.approx(float(loss), abs=1e-6)


@pytest.mark.parametrize(
    ("form", "match"),
    [
        ({"injection": "gate"}, "'gate'; choose one of none, add, concat"),
        ({"positions": "alibi"}, "'alibi'"),
        ({"states": 3}, "states=3"),
        ({"turns": 0}, "turns=0"),
        ({"hidden_size": "wide"}, "hidden_size of a looped model is 'wide': expected `int`"),
        ({"num_attention_heads": 0}, "num_attention_heads of a looped model is 0: expected `int` >= 1"),
        ({"turns": 2.5}, "turns of a looped model is 2.5"),
        ({"embedding_range": "x"}, "embedding_range of a looped model is 'x'"),
        ({"price_range": [1.0]}, "price_range of a looped model is \\[1.0\\]: expected `array` of length"),
        ({"price_range": [2.0, 1.0]}, "two prices above 0, the lower one first"),
        ({"relation_bias": True}, "relation_bias=True needs causal=False and place_features"),
        ({"hidden_size": 18, "num_attention_heads": 4}, "18 is no multiple of num_attention_heads 4"),
    ],
)
def test_a_form_that_does_not_exist_is_refused(form: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        LoopedConfig(**form)
