"""Prompt lookup: the logic against a script, the mode on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import adi
from adi.cli.app import app
from adi.decoding.records import Drafted, Rejected, Step
from adi.decoding.session import Session
from scripted import END, LAYERS, World, full_depth, lookup, request

TOKENS = st.lists(st.integers(1, 3), min_size=30, max_size=30)


def script(prompt: int, truth: list[int]) -> World:
    return World(prompt, truth, lambda depth, at: pytest.fail("lookup looks at no exit"))


@given(TOKENS, st.integers(1, 5), st.integers(1, 20), st.integers(1, 8), st.integers(1, 4), st.integers(0, 40))
def test_lookup_says_what_plain_decoding_says(truth, prompt, budget, draft, ngram, end) -> None:
    truth[end:] = [END] * len(truth[end:])
    plain = script(prompt, truth).run(full_depth(request(prompt, budget)))[0]
    said, asked, proposed = script(prompt, truth).run(lookup(request(prompt, budget), draft, ngram))
    assert [d.token for d in said] == [d.token for d in plain]
    assert {a.to for a in asked} == {LAYERS}, "drafts run no block"
    assert sum(d.draft is not None for d in said) + sum(len(d.rejected) for d in said) == proposed
    assert all(len(a.ids) <= draft + 1 for a in asked[1:])
    assert max(a.keep + len(a.ids) for a in asked) <= prompt + budget - 1, "no row that the budget has no use for"


def test_a_text_that_repeats_itself_takes_few_rounds() -> None:
    said, asked, _ = script(1, [1, 2, 3] * 10).run(lookup(request(1, 22), 5, 3))
    assert [len(a.ids) for a in asked] == [1, 1, 1, 1, 6, 6, 6], "four tokens alone, then blocks of five and one"
    assert [d.depth for d in said[4:10]] == [0] * 5 + [LAYERS]


def test_the_mode_keeps_the_text_of_a_model(tiny_model: adi.Model) -> None:
    prompt = "the dog and the dog and the fox"
    full = adi.generate(tiny_model, prompt, adi.FullDepth(), max_new_tokens=60)
    got = adi.generate(tiny_model, prompt, adi.Lookup(draft_tokens=4, ngram=2), max_new_tokens=60, logprobs=2)
    assert got.token_ids == full.token_ids
    assert got.mode == "lookup"
    assert 0 < got.counters.accepted <= got.counters.drafted
    assert got.counters.rounds == len(got.steps) - got.counters.accepted
    kinds = {(s.depth, s.level, s.drafted, s.accepted) for s in got.steps}
    assert kinds == {(0, "memory", True, True), (6, "full", False, False)}
    assert "drafts accepted" in str(got.summary())
    trace = adi.trace_of(got, adi.Lookup(), prompt)
    assert (trace.depths, trace.trigger) == ((0,), None)


def test_the_events_add_up(tiny_model: adi.Model) -> None:
    pending = 0
    for event in Session(tiny_model, "the dog and the dog", adi.Lookup(), max_new_tokens=40):
        match event:
            case Drafted():
                assert event.draft.depth == 0
                pending += 1
            case Rejected():
                pending -= event.count
            case Step():
                pending -= event.drafted
    assert pending == 0


def test_the_command_runs_it(tiny_folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    args = ["run", "the dog and the dog", "--model", tiny_folder, "--mode", "lookup", "-n", 30, "--compare", "--json"]
    done = CliRunner().invoke(app, [str(a) for a in [*args, "--trace", trace]])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["identical"] is True
    assert document["mode"] == "lookup"
    assert document["depth_histogram"]["0"] == document["accepted"] > 0
    assert CliRunner().invoke(app, ["plot", str(trace)]).exit_code == 0
    wrong = CliRunner().invoke(app, ["run", "x", "--model", str(tiny_folder), "--mode", "lookup", "--exits", "bare"])
    assert wrong.exit_code == 2
    assert "--exits means nothing in lookup mode" in wrong.output


def test_what_cannot_be_meant_is_refused() -> None:
    for options in ({"draft_tokens": 0}, {"ngram": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            adi.Lookup(**options)
