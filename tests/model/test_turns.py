"""A turn of a looped model is a block to the frontier: it may be split, drafted from, verified and cut back as any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import adi
from adi.decoding.frontier import Frontier
from adi.errors import AdiError, UsageError
from adi.model.arrays import normalise
from adi.model.backbone import Loop, Rows, States
from adi.model.looped import LoopedConfig, LoopedForCausalLM
from looped import in_random_order
from looped_shapes import SIZES, hrm_text, huginn, ouro, randomised, routed

IDS = (1, 2, 3, 4, 5, 6, 1, 2)


def own(**form: Any) -> LoopedForCausalLM:
    found: LoopedForCausalLM = randomised(LoopedForCausalLM(LoopedConfig(**{**SIZES, **form})))
    return found


MAKERS: dict[str, Callable[[], Any]] = {
    "concat": own,
    "add": partial(own, injection="add"),
    "two blocks a turn": partial(own, injection="add", core_layers=2),
    "none": partial(own, injection="none", core_layers=3),
    "two states, as in TRM": partial(own, states=2, inner_turns=2, injection="add"),
    "a prelude before": partial(own, prelude_layers=2, injection="none"),
    "a coda behind": partial(own, coda_layers=1),
    "a prelude that enters every turn": partial(own, prelude_layers=2),
    "prelude, two states and coda": partial(own, prelude_layers=1, states=2, injection="add", coda_layers=2),
    "shaped like Ouro": ouro,
    "shaped like Huginn": huginn,
    "shaped like Huginn, from noise by position": partial(huginn, "position"),
    "HRM-Text": hrm_text,
    "HRM-Text of one cycle": partial(hrm_text, H_cycles=1, num_hidden_layers=2),
}
LOOPS = {  # others have one block a turn, four turns, no prelude and no coda: first, period, turns, layers
    "a prelude before": (2, 1, 4, 6),
    "a coda behind": (0, 1, 4, 5),
    "a prelude that enters every turn": (2, 1, 4, 6),
    "prelude, two states and coda": (1, 1, 4, 7),
    "shaped like Ouro": (0, 2, 4, 8),
    "shaped like Huginn": (2, 2, 4, 12),
    "shaped like Huginn, from noise by position": (2, 2, 4, 12),
    "HRM-Text": (0, 4, 2, 8),  # with an inner loop
    "HRM-Text of one cycle": (0, 1, 3, 5),
}


def network(form: str) -> Any:
    torch.manual_seed(1)
    return MAKERS[form]()


def logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([tuple(ids)]), use_cache=False).logits[0]
    return found


def greedy(model: Any, ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The slow twin: the whole text is read again for each token."""
    text = list(ids)
    for _ in range(count):
        text.append(int(logits(model, text)[-1].argmax()))
    return tuple(text[len(ids) :])


@pytest.fixture(params=MAKERS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_turns_are_found_by_watching(form: str) -> None:
    spec = adi.load(network(form)).backbone.spec
    first, period, turns, layers = LOOPS.get(form, (0, 1, 4, 4))
    assert spec.loop == Loop(first, period, turns, Loop(0, 1, 3) if form == "HRM-Text" else None)
    assert spec.layers == layers
    assert spec.stops == tuple(range(1, layers + 1))


def test_any_split_gives_the_models_own_logits(form: str) -> None:
    model = network(form)
    backbone = adi.load(model).backbone
    for split in backbone.spec.stops[:-1]:
        with backbone.new_cache() as cache:
            (early,) = backbone.forward([Rows(cache, 0, IDS, None)], 0, split)
            (late,) = backbone.forward([Rows(cache, 0, IDS, early)], split, backbone.spec.layers)
        assert torch.allclose(backbone.logits(late), logits(model, IDS), atol=1e-4)


def test_logits_at_a_turn_are_the_heads_of_that_turn() -> None:
    model = network("concat")
    backbone, every = adi.load(model).backbone, model(torch.tensor([IDS]), output_turns=True)
    with backbone.new_cache() as cache:
        for turn in (1, 2, 4):
            (states,) = backbone.forward([Rows(cache, 0, IDS, None)], 0, turn)
            assert torch.allclose(backbone.logits(states), every.turn_logits[turn - 1, 0], atol=1e-4)


@settings(max_examples=24)
@example(min(MAKERS), [("l", 99), ("a", 1), ("l", 99), ("r", 1)])
@given(st.sampled_from(sorted(MAKERS)), st.lists(st.tuples(st.sampled_from("arl"), st.integers(1, 4)), max_size=12))
def test_random_orders_are_one_full_pass(form: str, orders: list[tuple[str, int]]) -> None:
    """Append, roll back and look at any turn in any order: the last states are those of one pass over the text."""
    model = network(form)
    backbone = adi.load(model).backbone
    frontier = Frontier(backbone)
    text = in_random_order(frontier, tuple(IDS), orders)
    wanted = logits(model, text)[-1]
    assert torch.allclose(backbone.logits(frontier.last_state(len(text) - 1))[-1], wanted, atol=1e-3)


def look(frontier: Frontier, depth: int) -> States:
    """What a head reads at ``depth``, with no scheduler between."""
    looking, reply = frontier.look(depth), None
    while True:
        try:
            ahead = looking.send(reply)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        (states,) = frontier.backbone.forward([ahead.rows], ahead.lo, ahead.hi)
        reply = SimpleNamespace(result=(ahead, states))


@settings(max_examples=24)
@given(
    st.sampled_from([form for form in MAKERS if "coda" in form or "Huginn" in form or "HRM" in form]),
    st.lists(st.tuples(st.sampled_from("arl"), st.integers(1, 7), st.booleans()), max_size=12),
)
def test_looks_change_no_later_result(form: str, orders: list[tuple[str, int, bool]]) -> None:
    """A look runs blocks ahead of their time: whenever there were looks, what comes later has the same bits as without."""
    backbone = adi.load(network(form)).backbone
    found = []
    for looks in (False, True):
        frontier = Frontier(backbone)
        frontier.append(IDS)
        states = []
        for what, n, looked in orders:
            if what == "a":
                frontier.append(tuple(range(n)))
            elif what == "r" and frontier.length > n:
                frontier.rollback(frontier.length - n)
            else:
                frontier.advance(depth := min(n, backbone.spec.layers))
                states.append(frontier.last_state(frontier.length - 1).raw_TD)
                if looks and looked and frontier.filled[depth - 1] == frontier.length > frontier.filled[-1]:
                    look(frontier, depth)
        frontier.advance(backbone.spec.layers)
        found.append([*states, frontier.last_state(frontier.length - 1).raw_TD])
        frontier.close()
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("form", ["a coda behind", "prelude, two states and coda"])
def test_a_turn_is_read_through_the_coda(form: str) -> None:
    """A look after turn t gives the logits of a model of only t turns, and of ``output_turns``; its gate reads the same."""
    model = network(form)
    loaded, every = adi.load(model), model(torch.tensor([IDS]), output_turns=True)
    spec, probe = loaded.backbone.spec, adi.bare_exits(loaded).probe
    for turn, depth in enumerate(adi.bare_exits(loaded).depths, 1):
        assert spec.tail(depth) == ((model.config.prelude_layers + 4, spec.layers),)
        frontier = Frontier(loaded.backbone)
        frontier.append(IDS)
        frontier.advance(depth)
        states, wanted = look(frontier, depth), model(torch.tensor([IDS]), turns=turn).logits[0]
        assert torch.allclose(loaded.backbone.logits(states), wanted, atol=1e-4)
        assert torch.allclose(every.turn_logits[turn - 1, 0], wanted, atol=1e-4)
        assert probe is not None
        assert torch.allclose(
            probe.chance("gate", depth, states.hidden_TD), every.halt_logits[turn - 1, 0].sigmoid(), atol=1e-5
        )
        frontier.close()
    with pytest.raises(UsageError, match=r"coda_layers=.*use_cache=False"):
        model(torch.tensor([IDS]), output_turns=True, use_cache=True)


def test_an_inner_step_of_hrm_is_read_by_a_call_of_the_slow_stack() -> None:
    """A look after l steps of the fast stack gives the logits of a model of one cycle of l steps."""
    model = network("HRM-Text")
    backbone = adi.load(model).backbone
    assert [backbone.spec.tail(d) for d in range(1, 9)] == [((3, 4),)] * 3 + [()] + [((7, 8),)] * 3 + [()]
    for steps in (1, 2, 3):
        small = hrm_text(H_cycles=1, L_cycles=steps)
        small.load_state_dict(model.state_dict())
        frontier = Frontier(backbone)
        frontier.append(IDS)
        frontier.advance(steps)
        assert torch.allclose(backbone.logits(look(frontier, steps)), logits(small, IDS), atol=1e-4)
        frontier.close()


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


@pytest.mark.parametrize("form", ["concat", "shaped like Huginn", "HRM-Text"])
def test_a_batch_is_each_alone(form: str) -> None:
    loaded = adi.load(network(form))
    exits = adi.bare_exits(loaded, (1, 2, 3))
    policy = adi.Verified(exits, trigger=adi.Always((1,)), draft_tokens=3)
    prompts = [tuple((i * k + 1) % 32 for i in range(5)) for k in range(6)]
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


def test_what_is_stored_is_what_is_read_later() -> None:
    """Of HRM both stacks' states, of Huginn what its prelude gave, of a stack in turns nothing more; heads see one of them."""
    wide = {form: adi.load(network(form)).backbone for form in ("HRM-Text", "shaped like Huginn", "shaped like Ouro")}
    found = {}
    for form, backbone in wide.items():
        with backbone.new_cache() as cache:
            states = backbone.forward([Rows(cache, 0, IDS, None)], 0, 4)[0]
            found[form] = tuple(states.raw_TD.shape)
            assert states.hidden_TD.shape == states.before_TD.shape == (8, 16)
    assert found == {"HRM-Text": (8, 32), "shaped like Huginn": (8, 32), "shaped like Ouro": (8, 16)}


def test_the_head_is_taken_apart_and_reads_what_it_can_of_a_wide_state(form: str) -> None:
    backbone = adi.load(network(form)).backbone
    readout = backbone.readout()
    with backbone.new_cache() as cache:
        (states,) = backbone.forward([Rows(cache, 0, IDS, None)], 0, backbone.spec.layers)

    def head(hidden_TD: torch.Tensor) -> tuple[torch.Tensor]:
        normed = normalise(hidden_TD, readout.norm, readout.eps) * readout.gain_D + readout.shift_D
        return (readout.scale * normed @ readout.weight_VD.T,)

    (got,) = backbone.compile("head", lambda: head, [backbone.spec.width])(states.raw_TD)
    assert torch.allclose(got, backbone.logits(states), atol=1e-4)
    assert torch.allclose(got, backbone.logits(states.hidden_TD), atol=1e-4)
    assert (readout.norm == "none") == (form == "HRM-Text")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (routed, "block 1 runs over 2 of 4 tokens"),
        (partial(huginn, "noise"), "two passes over the same text differ"),
        (partial(ouro, shared=True), "blocks 0 and 2 write the same layer of the KV cache, 0"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_reason(model: Callable[[], Any], why: str) -> None:
    with pytest.raises(AdiError, match=why):
        adi.load(model())


def test_a_text_with_fewer_turns_ends_in_a_sentence() -> None:
    loaded = adi.load(ouro(stops_at=9))
    assert adi.generate(loaded, (8, 1), adi.FullDepth(), max_new_tokens=2).token_ids
    with pytest.raises(AdiError, match="ran 6 of 8 blocks; how many turns it takes must not depend on the text"):
        adi.generate(loaded, (9, 1), adi.FullDepth(), max_new_tokens=2)
