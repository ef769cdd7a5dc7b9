"""Streaming and generating on a tiny model: the contract of the README."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adi
from adi.decoding.records import Counters, Drafted, Rejected, Step
from adi.decoding.stop_strings import StopStrings
from conftest import random_exits

ALWAYS = adi.Threshold("top_probability", 0.0)
SOMETIMES = adi.AnyOf((adi.Threshold("stability", 0.9), adi.Threshold("top_probability", 0.04)))


def policies(model: adi.Model) -> list[Any]:
    bare = adi.bare_exits(model, (2, 4))
    light = random_exits(model, (1, 3, 5), ALWAYS)
    return [
        adi.Verified(bare, ALWAYS),
        adi.Verified(bare, SOMETIMES, draft_tokens=3),
        adi.Verified(bare, adi.Threshold("hoyer", 0.3)),
        adi.Verified(light, draft_tokens=6),
        adi.Verified(light, adi.Threshold("entropy", 3.5), draft_tokens=2),
        adi.Verified(bare, draft_tokens=6),
        adi.Verified(bare),
    ]


def test_verified_is_full_depth_token_for_token(tiny_model: adi.Model) -> None:
    for prompt in ("the quick brown fox", "12 plus 30 is", "é 日本 😀"):
        full = adi.generate(tiny_model, prompt, adi.FullDepth(), max_new_tokens=40, stop_at_eos=False)
        for policy in policies(tiny_model):
            got = adi.generate(tiny_model, prompt, policy, max_new_tokens=40, stop_at_eos=False)
            assert got.token_ids == full.token_ids
            assert got.text == full.text
            assert len(got.steps) == 40


def test_full_depth_is_transformers_greedy(tiny_model: adi.Model, tiny_hf: Any) -> None:
    ids = tiny_model.encode("the lazy dog")
    with torch.no_grad():
        out = tiny_hf.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert (
        list(adi.generate(tiny_model, "the lazy dog", adi.FullDepth(), max_new_tokens=30).token_ids)
        == out[0, len(ids) :].tolist()
    )


def test_a_trigger_that_never_fires_is_full_depth_at_full_depths_cost(tiny_model: adi.Model) -> None:
    full = adi.generate(tiny_model, "hello", adi.FullDepth(), max_new_tokens=20, stop_at_eos=False)
    bare = adi.bare_exits(tiny_model, (2, 4))
    unreachable = adi.Threshold("top_probability", 2.0)
    for policy in (
        adi.Verified(bare, adi.Never()),
        adi.Reflex(bare, trigger=adi.Never()),
        adi.Verified(bare, unreachable),
        adi.Reflex(bare, trigger=unreachable),
    ):
        got = adi.generate(tiny_model, "hello", policy, max_new_tokens=20, stop_at_eos=False)
        assert got.token_ids == full.token_ids
        for count in ("row_blocks", "block_passes", "rounds"):
            assert getattr(got.counters, count) == getattr(full.counters, count)
    assert full.counters.row_blocks == (len(full.prompt_ids) + 19) * 6
    assert full.summary().block_rows == full.summary().block_rows_full
    assert full.summary().block_passes == full.summary().block_passes_full


def test_steps_tell_depth_level_and_fate(tiny_model: adi.Model) -> None:
    bare = adi.bare_exits(tiny_model, (2, 4))
    got = adi.generate(tiny_model, "hello", adi.Verified(bare, ALWAYS), max_new_tokens=40, stop_at_eos=False)
    assert [s.index for s in got.steps] == list(range(40))
    for step in got.steps:
        assert (step.level, step.drafted, step.accepted) in {("exit", True, True), ("full", False, False)}
        assert step.depth == (2 if step.drafted else 6)
        assert not (step.rejected and step.drafted)
        assert not step.drafted or "top_probability" in step.signals
    assert all(a.seconds <= b.seconds for a, b in pairwise(got.steps))
    summary = got.summary()
    assert summary.accepted == sum(s.drafted for s in got.steps)
    assert summary.drafted == summary.accepted + sum(len(s.rejected) for s in got.steps)
    assert summary.rounds == got.steps[-1].round
    assert summary.mean_depth == pytest.approx(sum(s.depth for s in got.steps) / 40)
    assert sum(summary.depth_histogram.values()) == summary.tokens == 40
    assert str(summary).startswith("40 tokens in ")
    assert str(got) == got.text


def test_events_show_drafts_come_and_go(tiny_model: adi.Model) -> None:
    bare = adi.bare_exits(tiny_model, (2,))
    session = adi.Session(tiny_model, "hello", adi.Verified(bare, ALWAYS, draft_tokens=3), max_new_tokens=30)
    open_drafts = 0
    for event in session:
        if isinstance(event, Drafted):
            open_drafts += 1
        elif isinstance(event, Rejected):
            open_drafts -= event.count
        elif event.drafted:
            open_drafts -= 1
        assert 0 <= open_drafts <= 3
    assert open_drafts == 0
    assert session.counters.drafted > 0


def test_reflex_says_that_nothing_calibrates_it(tiny_model: adi.Model) -> None:
    light = random_exits(tiny_model, (1, 3, 5), adi.Threshold("entropy", 0.0))
    got = adi.generate(tiny_model, "hello", adi.Reflex(light, thresholds={3: 99.0}), max_new_tokens=12, stop_at_eos=False)
    assert [s.depth for s in got.steps] == [6] + [3] * 11
    assert not got.summary().calibrated
    assert got.counters.row_blocks < got.summary().block_rows_full
    with pytest.raises(ValueError, match="certified by adi calibrate"):
        adi.Reflex(light)
    with pytest.raises(ValueError, match="AnyOf"):
        adi.Reflex(replace(light, trigger=SOMETIMES), thresholds=0.5)


def test_candidates_record_every_look(tiny_model: adi.Model) -> None:
    bare = adi.bare_exits(tiny_model, (2, 4))
    trigger = adi.Threshold("top_probability", {2: 2.0, 4: 0.0})
    got = adi.generate(tiny_model, "hello", adi.Verified(bare, trigger), max_new_tokens=60, logprobs=3, stop_at_eos=False)
    drafted = next(s for s in got.steps if s.drafted)
    assert [look.depth for look in drafted.looks] == [2, 4, 6]
    assert [look.fired for look in drafted.looks] == [False, True, False]
    for look in drafted.looks:
        assert set(look.signals) == {
            "entropy",
            "margin",
            "top_probability",
            "stability",
            "hoyer",
            "top_energy",
            "active_share",
            "route_margin",
        }
        chances = [c.probability for c in look.candidates]
        assert len(chances) == 3
        assert chances == sorted(chances, reverse=True)
        assert look.candidates[0].token == look.token
    assert drafted.looks[1].token == drafted.looks[2].token == drafted.token


def test_json_keeps_steps(tiny_model: adi.Model) -> None:
    bare = adi.bare_exits(tiny_model, (2, 4))
    got = adi.generate(tiny_model, "hello", adi.Verified(bare, ALWAYS), max_new_tokens=12, logprobs=2)
    for step in got.steps:
        assert Step.from_json(json.loads(json.dumps(step.to_json()))) == step
    good = got.steps[0].to_json()
    for name, bad in (("token", "7"), ("token", True), ("text", 3), ("seconds", None), ("looks", {}), ("signals", {"a": "b"})):
        with pytest.raises(ValueError, match=name):
            Step.from_json({**good, name: bad})
    with pytest.raises(ValueError, match="unknown field happiness"):
        Step.from_json({**good, "happiness": 1})


def test_eos_ends_the_text_and_may_be_ignored(tiny_model: adi.Model) -> None:
    free = adi.generate(tiny_model, "hello", adi.FullDepth(), max_new_tokens=30, stop_at_eos=False)
    eos = free.token_ids[11]
    first = free.token_ids.index(eos)
    short = adi.Model(tiny_model.backbone, tiny_model.tokenizer, frozenset({eos}))
    bare = adi.bare_exits(short, (2, 4))
    for policy in (
        adi.FullDepth(),
        adi.Verified(bare, ALWAYS),
        adi.Verified(bare, SOMETIMES),
        adi.Reflex(bare, trigger=adi.Never()),
    ):
        got = adi.generate(short, "hello", policy, max_new_tokens=30)
        assert (got.token_ids, got.finish) == (free.token_ids[: first + 1], "eos")
        assert adi.generate(short, "hello", policy, max_new_tokens=30, stop_at_eos=False).token_ids == free.token_ids
    assert adi.generate(short, "hello", adi.FullDepth(), max_new_tokens=3, stop_at_eos=False).finish == "length"


def test_stop_strings_end_the_text_and_are_left_out(tiny_model: adi.Model) -> None:
    free = adi.generate(tiny_model, "hello", adi.FullDepth(), max_new_tokens=40, stop_at_eos=False)
    stop = free.text[len(free.text) // 2 :][:3]
    at = free.text.index(stop)
    bare = adi.bare_exits(tiny_model, (2, 4))
    for policy in (adi.FullDepth(), adi.Verified(bare, ALWAYS)):
        got = adi.generate(tiny_model, "hello", policy, max_new_tokens=40, stop_at_eos=False, stop=[stop, "never there"])
        assert got.text == free.text[:at]
        assert got.finish == "stop"
        assert got.token_ids == free.token_ids[: len(got.token_ids)]
    for bad in ([""], [3]):
        with pytest.raises(ValueError, match="stop strings"):
            adi.generate(tiny_model, "hello", adi.FullDepth(), stop=bad)


def _step(index: int, text: str) -> Step:
    return Step(index, index, text, 1, "full", 1, False, False, {}, (), (), 0.0)


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_text_cuts_where_a_search_in_the_whole_text_would(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    # a longer stop that begins earlier may still be incomplete when a shorter one is found
    watcher = StopStrings(stops)
    shown: list[Any] = []
    for i, piece in enumerate(pieces):
        if watcher.hit is None:
            shown += watcher.push(_step(i, piece))
    got = "".join(step.text for step in [*shown, *watcher.rest()])
    if not ends:
        assert got == whole
        assert watcher.hit is None
    else:
        assert watcher.hit is not None
        assert whole.startswith(got + watcher.hit)
        assert not any(stop in got for stop in stops)


def test_the_context_limit_is_refused_before_any_work(tiny_model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny_model.backbone), "forward", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=r"500 tokens and max_new_tokens is 20.*context of 512.*at most 492"):
        adi.generate(tiny_model, [5] * 500, adi.FullDepth(), max_new_tokens=20)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        adi.generate(tiny_model, [5], adi.FullDepth(), max_new_tokens=0)


def test_the_last_token_of_the_context_can_be_used(tiny_model: adi.Model) -> None:
    bare = adi.bare_exits(tiny_model, (2,))
    got = adi.generate(tiny_model, [5] * 500, adi.Verified(bare, ALWAYS), max_new_tokens=12, stop_at_eos=False)
    assert len(got.token_ids) == 12


def test_sparsity_is_refused_where_there_is_no_single_mlp() -> None:
    from families import tiny

    model = adi.load(tiny("qwen3_moe"))
    with pytest.raises(ValueError, match=r"'hoyer'.*qwen3_moe.*use entropy"):
        adi.generate(model, [1, 2], adi.Verified(adi.bare_exits(model, (2,)), adi.Threshold("hoyer", 0.5)))


def test_a_stream_left_early_leaves_the_model_usable(tiny_model: adi.Model) -> None:
    full = adi.generate(tiny_model, "hello", adi.FullDepth(), max_new_tokens=10)
    policy = adi.Verified(adi.bare_exits(tiny_model, (2,)), ALWAYS)
    for taken in range(1, 6):
        stream = adi.stream(tiny_model, "hello", policy, max_new_tokens=10)
        assert tuple(next(stream).token for _ in range(taken)) == full.token_ids[:taken]
        stream.close()  # type: ignore[attr-defined]
        assert adi.generate(tiny_model, "hello", policy, max_new_tokens=10).token_ids == full.token_ids


def test_a_session_runs_once(tiny_model: adi.Model) -> None:
    session = adi.Session(tiny_model, "hello", adi.FullDepth(), max_new_tokens=3)
    assert len(list(session)) == 3
    with pytest.raises(RuntimeError, match="runs once"):
        list(session)


def test_the_text_is_whole_where_the_length_cuts_a_character(tiny_model: adi.Model) -> None:
    assert tiny_model.tokenizer is not None
    for length in range(1, 12):
        got = adi.generate(tiny_model, "é 日本 😀", adi.FullDepth(), max_new_tokens=length, stop_at_eos=False)
        assert got.text == tiny_model.tokenizer.decode(got.token_ids)


def test_what_cannot_be_meant_is_refused(tiny_model: adi.Model) -> None:
    bare = adi.bare_exits(tiny_model, (2, 4))
    with pytest.raises(ValueError, match=r"depths \[3\].*exits are at \[2, 4\]"):
        adi.Verified(bare, adi.Threshold("margin", {2: 0.5, 3: 0.5}))
    with pytest.raises(ValueError, match=r"depths \[5\]"):
        adi.Reflex(bare, thresholds={5: 0.5})
    with pytest.raises(ValueError, match="policy is of type Exits; give FullDepth"):
        adi.generate(tiny_model, "hello", bare)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logprobs is -1"):
        adi.generate(tiny_model, "hello", adi.FullDepth(), logprobs=-1)
    with pytest.raises(ValueError, match="raw=True"):
        adi.generate(tiny_model, [{"role": "user", "content": "hello"}], adi.FullDepth(), raw=True)


def test_signals_of_a_step_do_not_depend_on_tracing(tiny_model: adi.Model) -> None:
    policy = adi.Verified(adi.bare_exits(tiny_model, (2, 4)), ALWAYS)
    plain = adi.generate(tiny_model, "hello", policy, max_new_tokens=12)
    traced = adi.generate(tiny_model, "hello", policy, max_new_tokens=12, logprobs=2)
    assert [set(s.signals) for s in plain.steps] == [set(s.signals) for s in traced.steps]


def test_counters_are_plain_values() -> None:
    assert Counters(1, 2, 3, 4, 5, 0.0) == Counters(1, 2, 3, 4, 5, 0.0)
    with pytest.raises(ValueError, match="draft_tokens is 0"):
        adi.Verified(None, adi.Never(), draft_tokens=0)  # type: ignore[arg-type]
