"""Many sequences in shared passes: each as if it were alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adi
from adi.decoding.frontier import BlockPass, HeadPass
from adi.decoding.passes.sharing import sharing
from adi.decoding.records import Drafted, Rejected
from adi.decoding.scheduler import Observer, Scheduler
from adi.decoding.stop_strings import StopStrings
from adi.model.backbone import Rows, States
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
        adi.FullDepth(),
        adi.Verified(exits, adi.Always((2,)), draft_tokens=3),
        adi.Verified(exits, RAGGED, draft_tokens=5),
        adi.Reflex(exits, trigger=RAGGED),
        adi.Lookup(),
    ]


def same(a: adi.Generation, b: adi.Generation) -> bool:
    steps = [(s.token, s.depth, s.round, s.drafted, s.accepted, s.text) for s in a.steps]
    done = [c.row_blocks + c.reused * a.layers for c in (a.counters, b.counters)]  # a prompt in common is read once
    counts = [(c.rounds, c.drafted, c.accepted, rows) for c, rows in zip((a.counters, b.counters), done, strict=True)]
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
    adi.generate_batch(model, prompts, adi.FullDepth(), max_new_tokens=6, stop_at_eos=False)
    assert calls == [3] * 6
    calls.clear()
    adi.generate_batch(model, [[*range(64), 1, 2], [3]], adi.FullDepth(), max_new_tokens=3, stop_at_eos=False)
    assert calls == [1, 2, 2, 2], "the first part of a long prompt fills a pass, all else is shared"


def test_bad_prompts_are_named_before_any_work(model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adi.generate_batch(model, [], adi.FullDepth()) == []
    monkeypatch.setattr(model.backbone, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=r"prompt 1: .*empty"):
        adi.generate_batch(model, [[1], []], adi.FullDepth())
    with pytest.raises(ValueError, match="most is 0"):
        adi.generate_batch(model, [[1]], adi.FullDepth(), most=0)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_on_the_compiled_engine_bit_for_bit(precision: str) -> None:
    pytest.importorskip("openvino")
    from adi.model.openvino import export_and_open

    backbone = export_and_open(tiny("llama"), name="llama", precision=precision)
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
    from adi.model.openvino import export_and_open

    size = export_and_open(tiny("llama"), name="llama", precision="fp32", stops=(1,)).pool.block_bytes
    backbone = export_and_open(tiny("llama"), name="llama", precision="fp32", kv_bytes=blocks * size)
    return adi.Model(backbone=backbone, tokenizer=None, eos_ids=frozenset())


class Restarts(Observer[adi.Session]):
    """Of every text that had to begin again: its prompt, and how often it had been read."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.had_begun: list[bool] = []

    def on_restart(self, sequence: adi.Session) -> None:
        self.seen.append(sequence.prompt_ids)
        self.had_begun.append(sequence.counters.rounds > 0)


@pytest.mark.parametrize("kind", [0, 2, 4])
def test_full_memory_loses_no_text(kind: int) -> None:
    model, restarts = small(blocks=7), Restarts()
    policy = policies(model)[kind]
    prompts = [[(7 * i + j) % VOCABULARY for j in range(20 + 9 * i)] for i in range(6)]
    options: dict[str, Any] = {"max_new_tokens": 70, "stop_at_eos": False}
    together = adi.generate_batch(model, prompts, policy, observer=restarts, **options)
    alone = [adi.generate(model, prompt, policy, **options) for prompt in prompts]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    assert any(restarts.had_begun), "a text that was running made room"
    assert tuple(prompts[0]) not in restarts.seen, "the first to join goes on"
    assert len(set(restarts.seen)) == len(restarts.seen), "nobody begins again twice"
    assert model.backbone.pool.free == model.backbone.pool.capacity  # type: ignore[attr-defined]


def test_new_texts_join_where_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model, most, restarts = small(blocks=7), 0, Restarts()
    forward = model.backbone.forward

    def counted(rows: Any, lo: int, hi: int, **options: Any) -> Any:
        nonlocal most
        most = max(most, len(rows))
        return forward(rows, lo, hi, **options)

    monkeypatch.setattr(model.backbone, "forward", counted)
    together = adi.generate_batch(model, [[i] * 30 for i in range(8)], adi.FullDepth(), max_new_tokens=30, observer=restarts)
    assert len(together) == 8
    assert (most, restarts.seen) == (3, []), "three texts of two blocks each find room among seven"


def test_who_has_no_token_yet_makes_room_first() -> None:
    model, restarts = small(blocks=6), Restarts()
    model.backbone.fits = lambda wanted: True  # type: ignore[method-assign]
    prompts = [[i] * 40 for i in (1, 2, 3, 4)]
    adi.generate_batch(model, prompts, adi.FullDepth(), max_new_tokens=20, observer=restarts)
    assert set(restarts.seen) == {tuple(prompts[3])}, "only the last, ..."
    assert not any(restarts.had_begun), "... whose prompt has not run"


def test_a_text_that_cannot_fit_alone_is_named_and_costs_no_other() -> None:
    model = small(blocks=4)
    prompts = [[1, 2, 3], [4] * 100, [5] * 140, [6] * 30]
    with pytest.raises(ValueError, match=r"^prompt 1: the KV memory of .* is full: 1 more blocks .* 0 of 4 are free") as caught:
        adi.generate_batch(model, prompts, adi.FullDepth(), max_new_tokens=40)
    error = caught.value
    assert isinstance(error, adi.BatchMemoryError)
    assert error.prompts == (1, 2)
    assert sorted(error.finished) == [0, 3]
    for i, found in error.finished.items():
        assert same(found, adi.generate(model, prompts[i], adi.FullDepth(), max_new_tokens=40))
    assert model.backbone.pool.free == 4  # type: ignore[attr-defined]


def test_texts_share_no_pass_that_is_too_long_for_their_bits(model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[list[int]] = []
    forward = model.backbone.forward

    def counted(rows: Any, lo: int, hi: int, **options: Any) -> Any:
        counts.append([len(each.ids) for each in rows])
        return forward(rows, lo, hi, **options)

    monkeypatch.setattr(model.backbone, "forward", counted)
    prompts = [[i % VOCABULARY for i in range(size)] for size in (60, 40, 3, 90, 20, 5)]
    adi.generate_batch(model, prompts, adi.FullDepth(), max_new_tokens=4, stop_at_eos=False)
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


class Waiting:
    """A sequence that asks for the same pass over one row again and again."""

    text_ids = (1,)
    budget, prompt_ids, trials, stops = 9, (1,), None, staticmethod(lambda: StopStrings(()))

    def __init__(self) -> None:
        self.served, self.passes = 0, 10**6
        self.frontier: Any = SimpleNamespace(mlp=False, cache=None, length=1)

    def run(self) -> Any:
        for _ in range(self.passes):
            yield BlockPass(Rows(None, 5, (1,), None), 0, 4)
            self.served += 1

    def restart(self) -> None: ...

    def complete(self, stopped: bool) -> None: ...

    def close(self) -> None: ...


def engine(merged_rows: int) -> Any:
    """Whose passes do nothing."""
    spec = SimpleNamespace(merged_rows=merged_rows, chunk=1, together=None)
    return SimpleNamespace(spec=spec, fits=lambda wanted: True, forward=lambda rows, lo, hi, mlp: [None] * len(rows))


def test_nobody_waits_for_the_end_of_others() -> None:
    """Room for two rows of four that all want one: each has its turn, also one that joins late."""
    sequences = [Waiting() for _ in range(4)]
    scheduler = Scheduler[Waiting](engine(2))
    for one in sequences[:3]:
        scheduler.add(one)
    for _ in range(500):
        scheduler.step()
    before = [one.served for one in sequences]
    assert sum(before) == 1000
    scheduler.add(sequences[3])
    for turn in range(1, 21):
        scheduler.step()
        served = [one.served - at for one, at in zip(sequences, before, strict=True)]
        assert sum(served) == 2 * turn
        assert max(served[:3]) - min(served[:3]) <= 1, turn
        assert abs(served[3] - served[0]) <= 2, turn


def test_sequences_join_and_leave_between_passes() -> None:
    one, two, three = (Waiting() for _ in range(3))
    scheduler = Scheduler[Waiting](engine(64), most=2)
    one.passes = 5
    for each in (one, two, three):
        scheduler.add(each)
    scheduler.step()
    assert [each.served for each in (one, two, three)] == [1, 1, 0], "two at once"
    scheduler.cancel(two)
    scheduler.step()
    assert [each.served for each in (one, two, three)] == [2, 1, 1]
    for _ in range(4):
        scheduler.step()
    scheduler.cancel(three)
    scheduler.cancel(one)
    assert not scheduler.busy


def test_a_server_streams_many_texts_whose_prompts_come_at_any_time(model: adi.Model) -> None:
    prompts = [[1, 2, 3], [4, 6], [7, 8, 10, 11]]
    wanted = [adi.generate(model, prompt, adi.FullDepth(), max_new_tokens=9).token_ids for prompt in prompts]
    with Scheduler[adi.Session](model.backbone) as scheduler:
        sessions = [adi.Session(model, prompt, adi.Lookup(), max_new_tokens=9) for prompt in prompts]
        texts: dict[adi.Session, list[int]] = {session: [] for session in sessions}
        waiting = list(sessions)
        while scheduler.busy or waiting:
            if waiting:
                scheduler.add(waiting.pop(0))
            for session, event in scheduler.step():
                if isinstance(event, adi.Step):
                    texts[session].append(event.token)
    assert [tuple(texts[session]) for session in sessions] == wanted


def test_what_a_stream_has_shown_is_not_shown_again_where_a_text_begins_again() -> None:
    model = small(blocks=7)
    prompts = [[(7 * i + j) % VOCABULARY for j in range(20 + 9 * i)] for i in range(6)]
    for policy in policies(model)[1:2]:
        restarts = Restarts()
        options: dict[str, Any] = {"max_new_tokens": 70, "stop_at_eos": False}
        sessions = [adi.Session(model, prompt, policy, **options) for prompt in prompts]
        shown: dict[adi.Session, list[adi.Step]] = {session: [] for session in sessions}
        drafts = dict.fromkeys(sessions, 0)
        with Scheduler(model.backbone, observer=restarts) as scheduler:
            for session in sessions:
                scheduler.add(session)
            for session, event in scheduler:
                if isinstance(event, adi.Step):
                    shown[session].append(event)
                    drafts[session] -= event.accepted
                else:
                    drafts[session] += 1 if isinstance(event, Drafted) else -event.count if isinstance(event, Rejected) else 0
                assert drafts[session] >= 0
        assert any(restarts.had_begun)
        for session, prompt in zip(sessions, prompts, strict=True):
            assert same(session.generation(shown[session]), adi.generate(model, prompt, policy, **options))
            assert drafts[session] == 0


class Noted(Observer[adi.Session]):
    """Every row of every pass, and every score."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int]] = []
        self.scores: list[Any] = []

    def on_pass(self, sequence: adi.Session, done: BlockPass, states: States) -> None:
        assert states.hidden_TD.shape[0] == len(done.rows.ids)
        self.rows += [(*sequence.prompt_ids, done.rows.start, done.lo, done.hi)[-4:]]

    def on_scores(self, sequence: adi.Session, head: HeadPass, scores: Any) -> None:
        assert len(scores) == len(head.states)
        self.scores += list(scores)


def test_an_observer_sees_rows_states_and_scores(model: adi.Model) -> None:
    seen = Noted()
    (text,) = adi.generate_batch(model, [[8]], adi.FullDepth(), max_new_tokens=4, stop_at_eos=False, observer=seen)
    assert seen.rows == [(8, at, 0, LAYERS) for at in range(4)]
    assert seen.scores == list(text.token_ids)
    sampled = Noted()
    adi.generate_batch(model, [[8]], adi.FullDepth(), max_new_tokens=4, temperature=1.0, stop_at_eos=False, observer=sampled)
    assert [len(logits_V) for logits_V in sampled.scores] == [model.backbone.spec.vocabulary] * 4
