"""Looped models on the compiled engine: one turn is compiled once, and every law of a block holds for a turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from looped import in_random_order
from looped_shapes import SIZES, huginn, ouro, randomised

pytest.importorskip("openvino")

import adi
from adi.decoding.frontier import Frontier
from adi.errors import AdiError
from adi.model.backbone import Loop, Rows
from adi.model.looped import LoopedConfig, LoopedForCausalLM
from adi.model.openvino import export_and_open

IDS = tuple(int(i) for i in torch.randint(0, 32, (41,), generator=torch.Generator().manual_seed(5)))  # two blocks of KV memory


def own(**form: Any) -> LoopedForCausalLM:
    torch.manual_seed(1)
    found: LoopedForCausalLM = randomised(LoopedForCausalLM(LoopedConfig(**{**SIZES, **form})))
    return found


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return make()


MAKERS: dict[str, Callable[[], Any]] = {
    "two blocks a turn": partial(own, core_layers=2),
    "prelude and coda": partial(own, injection="none", prelude_layers=1, coda_layers=1),
    "shaped like Ouro": partial(seeded, ouro),  # with a norm between turns, which none precedes
}


def logits(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A looped model as it is saved, without a tokenizer."""
    made = tmp_path_factory.mktemp("looped")
    own().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def loaded(folder: Path) -> adi.Model:
    return adi.load(folder, backend="openvino", precision="fp32")


@pytest.mark.parametrize("form", MAKERS)
def test_any_split_gives_the_models_own_logits(form: str) -> None:
    model = MAKERS[form]()
    backbone = export_and_open(model, name=form, precision="fp32")
    assert backbone.spec.loop == adi.load(model).backbone.spec.loop
    assert backbone.spec.row_invariant
    for split in backbone.spec.stops[:-1]:
        with backbone.new_cache() as cache:
            (early,) = backbone.forward([Rows(cache, 0, IDS, None)], 0, split)
            (late,) = backbone.forward([Rows(cache, 0, IDS, early)], split, backbone.spec.layers)
        torch.testing.assert_close(backbone.logits(late), logits(model, IDS), atol=1e-4, rtol=1e-4)


def test_a_turn_is_compiled_once_and_has_kv_memory_of_its_own_in_each(loaded: adi.Model) -> None:
    backbone: Any = loaded.backbone
    assert backbone.spec.loop == Loop(0, 1, 4)
    assert len(backbone._manifest.attentions) == 1
    with backbone.new_cache() as cache:
        backbone.forward([Rows(cache, 0, IDS, None)], 0, 4)
        assert set(backbone.pool.tensors) == {"key_cache.0", "value_cache.0"}
        held = [backbone.peek(cache, block, len(IDS)) for block in range(4)]
        assert all(not torch.equal(one, other) for i, one in enumerate(held) for other in held[:i])
        with backbone.new_cache() as copy:
            assert backbone.resume(copy, [backbone.part(cache, 0, 33)], 33)
            assert all(torch.equal(backbone.peek(copy, i, 33), backbone.peek(cache, i, 33)) for i in range(4))


@settings(max_examples=12)
@example(orders=[("l", 4), ("a", 1), ("l", 4), ("r", 1)])
@given(orders=st.lists(st.tuples(st.sampled_from("arl"), st.integers(1, 4)), max_size=12))
def test_random_orders_are_one_full_pass(loaded: adi.Model, orders: list[tuple[str, int]]) -> None:
    backbone = loaded.backbone
    frontier = Frontier(backbone)
    text = in_random_order(frontier, tuple(IDS), orders)
    got = backbone.logits(frontier.last_state(len(text) - 1))[-1]
    torch.testing.assert_close(got, logits(own(), tuple(text))[-1], atol=1e-3, rtol=1e-3)


def test_rows_beside_others_are_each_alone_bit_for_bit(loaded: adi.Model) -> None:
    backbone = loaded.backbone

    def through(*texts: tuple[int, ...]) -> list[np.ndarray]:
        caches = [backbone.new_cache() for _ in texts]
        early = backbone.forward([Rows(cache, 0, text, None) for cache, text in zip(caches, texts, strict=True)], 0, 2)
        rows = [Rows(cache, 0, text, states) for cache, text, states in zip(caches, texts, early, strict=True)]
        return [states.raw_TD for states in backbone.forward(rows, 2, 4)]

    for texts in ([IDS[i : i + 1 + i % 5] for i in range(16)], [(IDS[i % len(IDS)],) for i in range(64)]):
        for text, found in zip(texts, through(*texts), strict=True):
            assert np.array_equal(through(text)[0], found)


def test_rows_at_different_turns_share_a_pass_and_each_is_alone_bit_for_bit(loaded: adi.Model) -> None:
    backbone: Any = loaded.backbone
    texts = [IDS[i : i + 1 + 7 * i] for i in range(6)]  # some in two blocks of KV memory

    def at_turn(turn: int, text: tuple[int, ...]) -> Rows:
        cache = backbone.new_cache()
        (states,) = backbone.forward([Rows(cache, 0, text, None)], 0, 1 + turn)
        return Rows(cache, 0, text, states, turn=turn)

    rows = [at_turn(i % 3, text) for i, text in enumerate(texts)]
    for row, text, found in zip(rows, texts, backbone.forward(rows, 1, 2), strict=True):
        twin = replace(at_turn(row.turn, text), turn=0)
        (alone,) = backbone.forward([twin], 1 + row.turn, 2 + row.turn)
        assert np.array_equal(alone.raw_TD, found.raw_TD)
        for block in range(2 + row.turn):
            held = [backbone.peek(cache, block, len(text)) for cache in (row.cache, twin.cache)]
            assert torch.equal(*held)


def test_sequences_at_different_turns_share_passes_and_say_what_each_says_alone(
    loaded: adi.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits = adi.bare_exits(loaded, (1, 2, 3))
    prompts = [tuple((i * k + 1) % 32 for i in range(5)) for k in range(6)]
    drafted = adi.Verified(exits, trigger=adi.Threshold("top_probability", 0.3), draft_tokens=4)
    policies = (adi.Reflex(exits, trigger=adi.Threshold("top_probability", 0.3)), drafted)
    alone = [[adi.generate(loaded, prompt, one, max_new_tokens=12).token_ids for prompt in prompts] for one in policies]
    turns, forward = list[int](), loaded.backbone.forward

    def watched(rows: Any, lo: int, hi: int, *, mlp: bool = False) -> Any:
        turns.extend(r.turn for r in rows)
        return forward(rows, lo, hi, mlp=mlp)

    monkeypatch.setattr(loaded.backbone, "forward", watched)
    for policy, wanted in zip(policies, alone, strict=True):
        turns.clear()
        found = adi.generate_batch(loaded, prompts, policy, max_new_tokens=12)
        assert [one.token_ids for one in found] == wanted
        assert any(turns)


def test_drafts_from_a_turn_are_verified_and_a_batch_is_each_alone(loaded: adi.Model) -> None:
    exits = adi.bare_exits(loaded, (1, 2, 3))
    prompts = [tuple((i * k + 1) % 32 for i in range(5)) for k in range(6)]
    wanted = [adi.generate(loaded, prompt, adi.FullDepth(), max_new_tokens=12).token_ids for prompt in prompts]
    text = list(prompts[1])
    for token in wanted[1]:
        assert token == int(logits(own(), tuple(text))[-1].argmax())
        text.append(token)
    for policy in (adi.Verified(), adi.Verified(exits, trigger=adi.Always((1,)), draft_tokens=4), adi.Lookup()):
        assert [found.token_ids for found in adi.generate_batch(loaded, prompts, policy, max_new_tokens=12)] == wanted
    found = adi.generate(
        loaded, prompts[1], adi.Reflex(exits, trigger=adi.Threshold("top_probability", 0.3)), max_new_tokens=12
    )
    assert len({step.depth for step in found.steps}) > 1


def test_an_export_is_found_again_and_rounds_to_eight_bits(folder: Path, loaded: adi.Model) -> None:
    again = adi.load(folder, backend="openvino", precision="fp32")
    assert adi.generate(again, IDS, max_new_tokens=4).token_ids == adi.generate(loaded, IDS, max_new_tokens=4).token_ids
    rounded = adi.load(folder, backend="openvino")
    assert (rounded.backbone.spec.precision, rounded.backbone.spec.loop) == ("int8", Loop(0, 1, 4))
    assert len(adi.generate(rounded, IDS, adi.Verified(), max_new_tokens=4).token_ids) == 4


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (partial(own, prelude_layers=1), "block 1 reads more than what the one before it gave"),
        (partial(own, states=2), "states of width 32, and its head reads 16"),
        (partial(seeded, huginn), "reads more than what the one before it gave"),
    ],
)
def test_what_one_turn_cannot_be_is_refused_by_name(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(AdiError, match=why):
        export_and_open(make(), name="x", precision="fp32")
