"""Many sequences in shared passes: each as if it were alone."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adi
from adi.decoding.frontier import BlockPass
from adi.decoding.scheduler import _meet, _Member, sharing
from adi.model.backbone import Rows
from adi.model.hf import HfBackbone
from families import VOCABULARY, tiny

torch = pytest.importorskip("torch")
LAYERS = 6
RAGGED = adi.AnyOf((adi.Threshold("stability", 0.93), adi.Threshold("top_probability", 0.03)))
ENDING = frozenset({5, 9})


@pytest.fixture(scope="module")
def model() -> adi.Model:
    return adi.Model(backbone=HfBackbone(tiny("llama"), "llama"), tokenizer=None, eos_ids=ENDING)


def policies(model: adi.Model) -> list[Any]:
    exits = adi.bare_exits(model, (2, 4))
    return [
        None,
        adi.Verified(exits, adi.Always((2,)), draft_tokens=3),
        adi.Verified(exits, RAGGED, draft_tokens=5),
        adi.Reflex(exits, trigger=RAGGED),
        adi.Lookup(),
    ]


def same(a: adi.Generation, b: adi.Generation) -> bool:
    steps = [(s.token, s.depth, s.round, s.drafted, s.accepted, s.text) for s in a.steps]
    counts = [(c.rounds, c.drafted, c.accepted, c.row_blocks) for c in (a.counters, b.counters)]
    return (
        steps == [(s.token, s.depth, s.round, s.drafted, s.accepted, s.text) for s in b.steps]
        and counts[0] == counts[1]
        and (a.finish, a.prompt_ids) == (b.finish, b.prompt_ids)
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=90), min_size=1, max_size=6),
    budget=st.integers(1, 14),
    kind=st.integers(0, 4),
    most=st.integers(1, 7),
)
def test_a_batch_gives_what_each_prompt_gives_alone(
    model: adi.Model, prompts: list[list[int]], budget: int, kind: int, most: int
) -> None:
    policy = policies(model)[kind]
    together = adi.generate_batch(model, prompts, policy, max_new_tokens=budget, most=most)
    alone = [adi.generate(model, prompt, policy, max_new_tokens=budget) for prompt in prompts]
    assert len(together) == len(alone)
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))


def test_passes_are_shared(model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = model.backbone.forward

    def counted(rows: Any, lo: int, hi: int, **options: Any) -> Any:
        calls.append(len(rows))
        return forward(rows, lo, hi, **options)

    monkeypatch.setattr(model.backbone, "forward", counted)
    prompts = [[1, 2, 3], [4, 6], [7, 8, 10, 11]]
    adi.generate_batch(model, prompts, max_new_tokens=6, stop_at_eos=False)
    assert calls == [3] * 6
    calls.clear()
    adi.generate_batch(model, [[*range(64), 1, 2], [3]], max_new_tokens=3, stop_at_eos=False)
    assert calls == [1, 2, 2, 1], "a long prompt runs alone, its tokens with the others"


def test_bad_prompts_are_named_before_any_work(model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adi.generate_batch(model, []) == []
    monkeypatch.setattr(model.backbone, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=r"prompt 1: .*empty"):
        adi.generate_batch(model, [[1], []])
    with pytest.raises(ValueError, match="most is 0"):
        adi.generate_batch(model, [[1]], most=0)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_on_the_compiled_engine_bit_for_bit(precision: str) -> None:
    pytest.importorskip("openvino")
    from adi.model.openvino import make

    backbone = make(tiny("llama"), name="llama", precision=precision)
    assert backbone.spec.row_invariant
    model = adi.Model(backbone=backbone, tokenizer=None, eos_ids=ENDING)
    prompts = [[(7 * i + j) % VOCABULARY for j in range(1 + 13 * i)] for i in range(7)]
    for policy in policies(model):
        together = adi.generate_batch(model, prompts, policy, max_new_tokens=12, most=4)
        alone = [adi.generate(model, prompt, policy, max_new_tokens=12) for prompt in prompts]
        assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    assert backbone.pool.free == backbone.pool.capacity, "every block came back"


def small(blocks: int) -> adi.Model:
    """The tiny llama on the compiled engine with KV memory for so many blocks of 32 positions."""
    pytest.importorskip("openvino")
    from adi.model.openvino import make

    size = make(tiny("llama"), name="llama", precision="fp32", stops=(1,)).pool.block_bytes
    backbone = make(tiny("llama"), name="llama", precision="fp32", kv_bytes=blocks * size)
    return adi.Model(backbone=backbone, tokenizer=None, eos_ids=frozenset())


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every text that had to begin again: its prompt, and how many tokens it had said."""
    seen: list[tuple[int, int]] = []
    start_over = _Member.start_over

    def noted(member: _Member) -> None:
        seen.append((member.index, len(member.steps)))
        start_over(member)

    monkeypatch.setattr(_Member, "start_over", noted)
    return seen


@pytest.mark.parametrize("kind", [0, 2, 4])
def test_full_memory_loses_no_text(kind: int, restarts: list[tuple[int, int]]) -> None:
    model = small(blocks=7)
    policy = policies(model)[kind]
    prompts = [[(7 * i + j) % VOCABULARY for j in range(20 + 9 * i)] for i in range(6)]
    options: dict[str, Any] = {"max_new_tokens": 70, "stop_at_eos": False}
    together = adi.generate_batch(model, prompts, policy, **options)
    alone = [adi.generate(model, prompt, policy, **options) for prompt in prompts]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    assert any(said for _, said in restarts), "a text that was running made room"
    assert 0 not in {prompt for prompt, _ in restarts}, "the first to enter goes on"
    assert len({prompt for prompt, _ in restarts}) == len(restarts), "nobody begins again twice"
    assert model.backbone.pool.free == model.backbone.pool.capacity  # type: ignore[attr-defined]


def test_new_texts_enter_where_memory_is_free(restarts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, most = small(blocks=7), 0
    forward = model.backbone.forward

    def counted(rows: Any, lo: int, hi: int, **options: Any) -> Any:
        nonlocal most
        most = max(most, len(rows))
        return forward(rows, lo, hi, **options)

    monkeypatch.setattr(model.backbone, "forward", counted)
    together = adi.generate_batch(model, [[i] * 30 for i in range(8)], max_new_tokens=30)
    assert len(together) == 8
    assert (most, restarts) == (3, []), "three texts of two blocks each find room among seven"


def test_who_has_said_nothing_makes_room_first(restarts: list[tuple[int, int]]) -> None:
    model = small(blocks=7)
    model.backbone.fits = lambda wanted: True  # type: ignore[method-assign]
    adi.generate_batch(model, [[1] * 60, [2] * 60, [3] * 60, [4] * 60], max_new_tokens=4)
    assert set(restarts) == {(3, 0)}, "only the last, whose prompt has not run"


def test_a_text_that_cannot_fit_alone_is_named_and_costs_no_other(restarts: list[tuple[int, int]]) -> None:
    model = small(blocks=4)
    prompts = [[1, 2, 3], [4] * 100, [5] * 140, [6] * 30]
    with pytest.raises(ValueError, match=r"^prompt 1: the KV memory of .* is full: 1 more blocks .* 0 of 4 are free") as caught:
        adi.generate_batch(model, prompts, max_new_tokens=40)
    error = caught.value
    assert isinstance(error, adi.BatchMemoryError)
    assert error.prompts == (1, 2)
    assert sorted(error.finished) == [0, 3]
    for i, found in error.finished.items():
        assert same(found, adi.generate(model, prompts[i], max_new_tokens=40))
    assert model.backbone.pool.free == 4  # type: ignore[attr-defined]


def test_texts_share_no_pass_that_is_too_long_for_their_bits(model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[list[int]] = []
    forward = model.backbone.forward

    def counted(rows: Any, lo: int, hi: int, **options: Any) -> Any:
        counts.append([len(each.ids) for each in rows])
        return forward(rows, lo, hi, **options)

    monkeypatch.setattr(model.backbone, "forward", counted)
    prompts = [[i % VOCABULARY for i in range(size)] for size in (60, 40, 3, 90, 20, 5)]
    adi.generate_batch(model, prompts, max_new_tokens=4, stop_at_eos=False)
    assert all(sum(each) <= 64 or len(each) == 1 for each in counts), "one text may have a long prompt, several may not"
    assert max(len(each) for each in counts) == 6, "and all of them go on together"
    assert sum(map(sum, counts)) == sum(map(len, prompts)) + 6 * 3, "nobody ran twice"


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 64))
def test_who_shares_a_pass(counts: list[int], most: int) -> None:
    chosen = sharing(counts, most)
    assert chosen[0] == 0, "whoever waited longest goes"
    assert chosen == sorted(set(chosen))
    total = sum(counts[place] for place in chosen)
    assert total <= most or chosen == [0]
    assert all(counts[place] + total > most for place in range(len(counts)) if place not in chosen and place > chosen[-1])


def test_nobody_waits_for_the_end_of_others() -> None:
    """Rows for two of four that all want one: each has its turn, also those that have been there for long."""
    spec = SimpleNamespace(merged_rows=2)
    backbone: Any = SimpleNamespace(spec=spec, forward=lambda rows, lo, hi, mlp: [None] * len(rows))
    served: Counter[int] = Counter()

    def member(index: int, met: int) -> Any:
        session = SimpleNamespace(frontier=SimpleNamespace(mlp=False), answer=lambda value: served.update([index]))
        return SimpleNamespace(session=session, met=met, need=BlockPass(Rows(None, 5, (1,), None), 0, 4))

    members = [member(0, 500), member(1, 499), member(2, 500), member(3, 0)]
    for turn in range(1, 21):
        assert len(_meet(backbone, members)) == 2
        assert max(served[i] for i in range(4)) - min(served[i] for i in range(4)) <= 1, turn
