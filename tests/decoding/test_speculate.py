"""The decoding logic driven by a script instead of a model: it only ever sees what it asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adi.exits.triggers import Never, Threshold
from scripted import END, GUESSES, LAYERS, TRUTH, World, full_depth, reflex, request, verified


@given(TRUTH, GUESSES, st.integers(1, 5), st.integers(1, 20), st.integers(1, 8))
def test_verified_says_exactly_the_truth_whatever_the_exits_say(truth, guesses, prompt, budget, draft) -> None:
    world = World(prompt, truth, lambda depth, at: guesses[(2 * at + (depth == 6)) % 60])
    said, _, proposed = world.run(verified(request(prompt, budget), draft))
    assert [d.token for d in said] == truth[:budget]
    assert sum(d.draft is not None for d in said) + sum(len(d.rejected) for d in said) == proposed


@given(TRUTH, st.integers(1, 20), st.integers(0, 19))
def test_it_ends_with_the_token_that_ends(truth, budget, end) -> None:
    truth[end] = END
    sure = World(2, truth, lambda depth, at: (truth[at], 0.9))
    wanted = truth[: min(budget, end + 1)]
    assert [d.token for d in sure.run(verified(request(2, budget), 4))[0]] == wanted
    assert [d.token for d in sure.run(reflex(request(2, budget)))[0]] == wanted


def test_perfect_drafts_are_verified_in_blocks() -> None:
    truth = [1 + i % 5 for i in range(30)]
    said, asked, _ = World(3, truth, lambda depth, at: (truth[at], 0.9)).run(verified(request(3, 13), 5))
    full = [a for a in asked if a.to == LAYERS]
    assert [a.read for a in full] == [1, 6, 6]
    assert [d.round for d in said] == [1] + [2] * 6 + [3] * 6
    assert [d.depth for d in said] == [10] + [3] * 5 + [10] + [3] * 5 + [10]


def test_a_rejected_tail_is_rolled_back_and_reported() -> None:
    truth = [1, 2, 3, 4, 5, 1, 2, 3]
    world = World(2, truth, lambda depth, at: (5 if at == 3 else truth[at], 0.9))
    said, asked, _ = world.run(verified(request(2, 6), 4))
    corrected = said[3]
    assert (corrected.token, corrected.depth, corrected.draft) == (4, LAYERS, None)
    assert [p.token for p in corrected.rejected] == [5, 0]
    after = asked[[a.to for a in asked].index(LAYERS, 1) + 1]
    assert after.keep == 2 + 3, "prompt, first token and the two accepted drafts"


def test_a_token_climbs_until_it_is_believed_and_never_asks_twice() -> None:
    truth = [1, 2, 3, 4, 5, 1, 2, 3]
    world = World(1, truth, lambda depth, at: (truth[at], 0.9 if depth == 6 else 0.1))
    said, asked, _ = world.run(verified(request(1, 4), 2))
    assert [(a.to, a.ids) for a in asked[1:6]] == [(3, (1,)), (6, ()), (3, (2,)), (6, ()), (10, (3,))]
    assert [g.fired for g in said[1].checks] == [False, True, False]


def test_silence_ends_a_draft_and_costs_no_extra_row() -> None:
    truth = [1, 2, 3, 4, 5, 1, 2, 3]
    world = World(1, truth, lambda depth, at: (truth[at], 0.9 if at < 3 else 0.1))
    _, asked, _ = world.run(verified(request(1, 6), 5))
    first = next(a for a in asked[1:] if a.to == LAYERS)
    assert (first.ids, first.read) == ((), 3), "the silent row is already in the network; two drafts and it are read"


@given(TRUTH, st.integers(1, 20))
def test_without_stops_every_token_is_one_full_pass(truth, budget) -> None:
    world = World(2, truth, lambda depth, at: (0, 1.0))
    wanted = request(2, budget)
    for sequence in (verified(wanted, 4, ()), reflex(wanted, stops=()), full_depth(wanted)):
        said, asked, proposed = world.run(sequence)
        assert [d.token for d in said] == truth[:budget]
        assert [(a.to, a.read) for a in asked] == [(LAYERS, 1)] * budget
        assert proposed == 0


def test_reflex_lets_believed_tokens_stand() -> None:
    truth = [1, 2, 3, 4, 5, 1, 2, 3]
    said, asked, _ = World(1, truth, lambda depth, at: (truth[at], 0.9)).run(reflex(request(1, 5)))
    assert [d.depth for d in said] == [LAYERS, 3, 3, 3, 3]
    assert [a.to for a in asked] == [LAYERS, 3, 3, 3, 3]


def test_the_trigger_is_asked_with_the_depth() -> None:
    truth = [1, 2, 3, 4, 5, 1, 2, 3]
    logic = reflex(request(1, 4), trigger=Threshold("margin", {6: 0.5}))
    said, _, _ = World(1, truth, lambda depth, at: (truth[at], 0.9)).run(logic)
    assert [d.depth for d in said] == [LAYERS, 6, 6, 6]
    assert not Never().fires({}, 3)
