"""The frontier: any order of its operations gives the states of one full pass, and nothing runs twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adi.decoding.frontier import Frontier
from adi.model.backbone import KVCache, ReadOut, Rows, Spec, States, raw_of
from adi.model.hf import HfBackbone
from families import tiny

LAYERS, WIDTH = 5, 3


class ToyCache(KVCache):
    def __init__(self, rows: dict[int, list[torch.Tensor]]) -> None:
        self.rows = rows

    def close(self) -> None:
        self.rows.clear()


class SumBackbone:
    """A toy with exact arithmetic in which every state depends on all positions up to it, layer by layer.

    Block l keeps, per position, the running sum of what entered it and adds it, times l + 1, to the state. It notes
    every (layer, position) that it ran, and fails if a layer is asked to skip a position.
    """

    def __init__(self) -> None:
        self.spec = Spec("sum", "toy", LAYERS, WIDTH, 50, tuple(range(1, LAYERS + 1)), None, "f", "toy", "fp64", "cpu")
        self.ran: Counter[tuple[int, int]] = Counter()

    has_mlp_tap = can_propagate = False

    def new_cache(self) -> ToyCache:
        return ToyCache({layer: [] for layer in range(LAYERS)})

    def forward(self, rows: Sequence[Rows], lo: int, hi: int, *, mlp: bool = False) -> list[States]:
        return [self._one(r, lo, hi) for r in rows]

    def _one(self, rows: Rows, lo: int, hi: int) -> States:
        state = self.embed(rows.ids) if rows.states is None else raw_of(rows.states)
        before = state
        for layer in range(lo, hi):
            memory = rows.cache.rows[layer]
            assert len(memory) >= rows.start, "a layer skipped a position"
            del memory[rows.start :]
            before, out = state, []
            for i, row in enumerate(state):
                self.ran[layer, rows.start + i] += 1
                memory.append(row + (memory[-1] if memory else 0))
                out.append(row + (layer + 1) * memory[-1] % 97)
            state = torch.stack(out)
        return States(state, before)

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([[i, 2 * i + 1, i * i % 7] for i in ids], dtype=torch.float64)

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return hidden_TD

    def readout(self) -> ReadOut:
        raise NotImplementedError


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 49), min_size=1, max_size=5)),
        st.tuples(st.just("advance"), st.integers(0, LAYERS)),
        st.tuples(st.just("rollback"), st.floats(0, 1)),
    ),
    max_size=30,
)


def play(frontier: Frontier, actions: Sequence[tuple[str, Any]]) -> bool:
    """Do the actions; says whether any of them went back."""
    went_back = False
    for kind, value in actions:
        if kind == "append":
            frontier.append(value)
        elif kind == "advance":
            frontier.advance(value)
            assert all(frontier.filled[layer] == frontier.length for layer in range(value))
        else:
            frontier.rollback(round(value * frontier.length))
            went_back = True
        assert frontier.filled == sorted(frontier.filled, reverse=True), "the staircase rises"
        assert frontier.filled[0] <= frontier.length
    return went_back


def deepest(frontier: Frontier, actions: Sequence[tuple[str, Any]]) -> torch.Tensor:
    """The states of all positions at full depth, each as the pass left it that brought it there."""
    deep: list[torch.Tensor] = []
    for action in actions:
        play(frontier, [action])
        del deep[frontier.length :]
        if frontier.filled[-1] == frontier.length > len(deep):
            deep += list(frontier.states(len(deep), frontier.length).hidden_TD)
    return torch.stack(deep)


@given(ACTIONS, st.integers(0, 49))
def test_any_order_gives_the_states_of_one_full_pass(actions: list[tuple[str, Any]], last: int) -> None:
    frontier = Frontier(SumBackbone())
    deep_TD = deepest(frontier, [*actions, ("append", [last]), ("advance", LAYERS)])
    whole = Frontier(SumBackbone())
    whole.append(frontier.ids)
    whole.advance(LAYERS)
    assert torch.equal(deep_TD, whole.states(0, whole.length).hidden_TD)


@given(ACTIONS)
def test_the_newest_state_is_that_of_the_run_which_its_position_is_in(actions: list[tuple[str, Any]]) -> None:
    frontier = Frontier(SumBackbone())
    for action, value in actions:
        play(frontier, [(action, value)])
        if frontier._runs:
            for position in range(frontier._runs[0][0], frontier._runs[-1][1]):
                wanted = frontier.states(position, position + 1).hidden_TD
                assert torch.equal(frontier.last_state(position).hidden_TD, wanted)


def test_states_that_no_block_reads_again_are_let_go() -> None:
    frontier = Frontier(SumBackbone())
    for number in range(50):
        frontier.append([number] * 3)
        frontier.advance(2)
        frontier.advance(LAYERS)
        frontier.rollback(frontier.length - 1)
        assert len(frontier._runs) == 1
        assert frontier.last_state(frontier.length - 1).hidden_TD.shape == (1, WIDTH)
    with pytest.raises(AssertionError, match="states are held of"):
        frontier.states(0, frontier.length)
    frontier.close()
    assert (frontier._runs, frontier.last) == ([], None)


@given(ACTIONS)
def test_no_layer_runs_a_position_twice_without_a_rollback(actions: list[tuple[str, Any]]) -> None:
    backbone = SumBackbone()
    frontier = Frontier(backbone)
    forward_only = [(kind, value) for kind, value in actions if kind != "rollback"]
    assert not play(frontier, forward_only)
    frontier.advance(LAYERS)
    wanted = {(layer, t): 1 for layer in range(LAYERS) for t in range(frontier.length)}
    assert backbone.ran == wanted
    assert frontier.row_blocks == len(wanted)


@given(ACTIONS)
def test_after_a_rollback_only_what_was_forgotten_runs_again(actions: list[tuple[str, Any]]) -> None:
    backbone = SumBackbone()
    frontier = Frontier(backbone)
    for kind, value in actions:
        before, filled = backbone.ran.copy(), list(frontier.filled)
        play(frontier, [(kind, value)])
        fresh = backbone.ran - before
        assert all(count == 1 and position >= filled[layer] for (layer, position), count in fresh.items())


@settings(max_examples=15)
@given(ACTIONS, st.sampled_from(["llama", "gemma3", "lfm2", "gpt2"]))
def test_the_same_holds_on_real_architectures(actions: list[tuple[str, Any]], family: str) -> None:
    backbone = HfBackbone(tiny(family))
    frontier = Frontier(backbone)
    deep_TD = deepest(frontier, [*actions, ("append", [7]), ("advance", backbone.spec.layers)])
    with torch.no_grad():
        wanted = backbone.model(torch.tensor([frontier.ids])).logits[0]
    torch.testing.assert_close(backbone.logits(deep_TD), wanted, atol=1e-4, rtol=0)


def test_to_advance_to_no_depth_is_nothing() -> None:
    frontier = Frontier(SumBackbone())
    frontier.append([1, 2])
    frontier.advance(0)
    assert frontier.row_blocks == 0
    frontier.advance(2)
    frontier.advance(0)
    assert frontier.row_blocks == 4


def test_a_rollback_beyond_the_end_is_our_own_mistake() -> None:
    frontier = Frontier(SumBackbone())
    frontier.append([1, 2])
    with pytest.raises(AssertionError):
        frontier.rollback(3)
