"""A sequence that is cancelled, fails or begins again: nothing of it is complete, and no neighbour notices."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace as changed

import adi
from adi.decoding.frontier import BlockPass
from adi.decoding.records import Draft, Drafted, DriftFound, Event, Rejected, Step
from adi.decoding.scheduler import Scheduler, _Entry
from adi.decoding.stop_strings import StopStrings
from adi.drafters.history import History
from adi.drafters.network import Drafting
from adi.errors import MemoryFullError, NoDistributionError
from adi.model.backbone import Rows, States
from conftest import exits_with_drafter
from families import VOCABULARY

PROMPTS = [[1, 2, 3], [4, 6], [7, 8, 10, 11]]


def step(index: int, text: str = "a") -> Step:
    return Step(index, 1, text, 4, "full", 1, False, False, {}, (), (), 0.0)


class Scripted:
    """A sequence whose needs and events stand in a list."""

    budget, prompt_ids, trials, stops = 9, (1,), None, staticmethod(lambda: StopStrings(()))

    def __init__(self, *script: Any) -> None:
        self.script, self.completed, self.closed = script, 0, 0
        self.frontier: Any = SimpleNamespace(mlp=False, cache=None, length=1)

    def run(self) -> Any:
        for item in self.script:
            if isinstance(item, Exception):
                raise item
            yield item

    def restart(self) -> None: ...

    def complete(self, stopped: bool) -> None:
        self.completed += 1

    def close(self) -> None:
        self.closed += 1


def one_pass() -> BlockPass:
    return BlockPass(Rows(None, 5, (1,), None), 0, 4)


def engine(**changes: Any) -> Any:
    """Whose passes do nothing."""
    spec = SimpleNamespace(merged_rows=64, row_invariant=True, together=None)
    common = {"spec": spec, "fits": lambda wanted: True, "forward": lambda rows, lo, hi, mlp: [None] * len(rows)}
    return SimpleNamespace(**{**common, **changes})


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_cancelling_while_events_are_read_takes_nothing_from_others(llama: adi.Model, tmp_path: Path, victim: int) -> None:
    """The sequence whose event was just read, its neighbours before and after it."""
    known = History.open(tmp_path / "h", fingerprint="x", vocabulary=VOCABULARY)
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_at_eos": False}
    wanted = [adi.generate(llama, prompt, adi.FullDepth(), **options).token_ids for prompt in PROMPTS]
    sessions = [adi.Session(llama, prompt, adi.Verified(history=known), **options) for prompt in PROMPTS]
    tokens: dict[adi.Session, list[int]] = {session: [] for session in sessions}
    with Scheduler[adi.Session](llama.backbone) as scheduler:
        for session in sessions:
            scheduler.add(session)
        for session, event in scheduler:
            assert session is not sessions[victim] or len(tokens[session]) < 3, "nothing comes of it afterwards"
            if isinstance(event, Step):
                tokens[session].append(event.token)
            if session is sessions[1] and len(tokens[session]) >= 2 and len(tokens[sessions[victim]]) < 9:
                scheduler.cancel(sessions[victim])
    for i, session in enumerate(sessions):
        if i != victim:
            assert tuple(tokens[session]) == wanted[i]
    assert known.info().sequences == 2, "a cancelled text is not remembered"


def test_after_a_restart_nobody_is_told_of_drafts_that_he_did_not_see() -> None:
    """The second run drafts where the first one did not."""
    kept, draft = changed(step(2), drafted=True, accepted=True), Drafted(Draft(1, "a", 0, "memory"))
    one = Scripted(step(0), step(1), step(2), one_pass())
    entry = _Entry(one)
    assert [event.index for event in entry.advance() if isinstance(event, Step)] == [0, 1, 2]
    assert entry.restart() == []
    one.script = (step(0), draft, draft, draft, step(1), kept, changed(kept, index=3), Rejected(1), draft, draft, Rejected(2))
    entry.begin()
    assert list(entry.advance()) == [changed(kept, index=3), draft, draft, Rejected(2)]
    assert entry.drafts == 0


def test_closing_the_driver_while_events_are_read_completes_nothing() -> None:
    one, two = Scripted(step(0), step(1), one_pass()), Scripted(step(0), one_pass())
    with Scheduler[Scripted](engine()) as scheduler:
        scheduler.add(one)
        scheduler.add(two)
        for _ in scheduler:
            scheduler.close()
    assert (one.completed, two.completed) == (0, 0)
    assert min(one.closed, two.closed) == 1


def test_logits_without_a_distribution_end_their_own_sequence_only(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(llama.backbone, "spec", replace(llama.backbone.spec, row_invariant=True))
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_at_eos": False}
    wanted = [adi.generate(llama, prompt, adi.FullDepth(), **options).token_ids for prompt in PROMPTS]
    sessions = [adi.Session(llama, prompt, adi.FullDepth(), **options) for prompt in PROMPTS]
    forward = llama.backbone.forward

    def poisoned(rows: Any, lo: int, hi: int, **given: Any) -> list[States]:
        found = forward(rows, lo, hi, **given)
        bad = [each.cache is sessions[1].frontier.cache and each.start >= 4 for each in rows]
        return [States(torch.full_like(s.hidden_TD, torch.nan)) if b else s for s, b in zip(found, bad, strict=True)]

    monkeypatch.setattr(llama.backbone, "forward", poisoned)
    tokens: dict[adi.Session, list[int]] = {session: [] for session in sessions}
    with Scheduler[adi.Session](llama.backbone) as scheduler:
        for session in sessions:
            scheduler.add(session)
        while scheduler.busy:
            for session, event in scheduler.step():
                if isinstance(event, Step):
                    tokens[session].append(event.token)
    assert isinstance(scheduler.failed.pop(sessions[1]), NoDistributionError)
    assert not scheduler.failed
    assert [tuple(tokens[session]) for session in sessions] == [wanted[0], wanted[1][:3], wanted[2]]


def test_a_batch_raises_what_one_of_its_texts_failed_with(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise NoDistributionError("no distribution")

    monkeypatch.setattr(Drafting, "step", fail)
    policy = adi.Static(exits_with_drafter(llama), 0, 2)
    monkeypatch.setattr(adi.Static, "prepare", lambda *_: None)
    for run in (lambda: adi.generate(llama, [1, 2], policy), lambda: adi.generate_batch(llama, PROMPTS, policy)):
        with pytest.raises(NoDistributionError, match="no distribution"):
            run()


def test_a_sequence_that_raises_is_never_complete() -> None:
    bad, good = Scripted(step(0), one_pass(), NoDistributionError("nan")), Scripted(one_pass(), step(0), one_pass(), step(1))
    scheduler = Scheduler[Scripted](engine())
    scheduler.add(bad)
    scheduler.add(good)
    assert [event.index for one, event in scheduler if one is good and isinstance(event, Step)] == [0, 1]
    assert (bad.completed, good.completed) == (0, 1)
    assert [type(error) for error in scheduler.failed.values()] == [NoDistributionError]
    assert bad.closed >= 1


def test_a_bug_in_a_sequence_surfaces_as_itself_once() -> None:
    bad, good = Scripted(one_pass(), ZeroDivisionError("bug")), Scripted(*[one_pass()] * 3, step(0))
    scheduler = Scheduler[Scripted](engine())
    scheduler.add(bad)
    scheduler.add(good)
    with pytest.raises(ZeroDivisionError):
        scheduler.step()
    assert [event.index for _, event in scheduler if isinstance(event, Step)] == [0]
    assert (bad.completed, good.completed) == (0, 1)


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_sequence_that_never_began_is_closed(how: str) -> None:
    waiting = Scripted(one_pass())
    scheduler = Scheduler[Scripted](engine(), most=1)
    scheduler.add(Scripted(*[one_pass()] * 3))
    scheduler.add(waiting)
    scheduler.step()
    if how == "cancel":
        scheduler.cancel(waiting)
    else:
        scheduler.close()
    assert (waiting.closed, waiting.completed) == (1, 0)


def test_a_session_that_is_closed_holds_no_cache(llama: adi.Model) -> None:
    session = adi.Session(llama, [1, 2, 3], adi.FullDepth(), max_new_tokens=2)
    closed: list[bool] = []
    session.frontier.cache.close = lambda: closed.append(True)
    scheduler = Scheduler[adi.Session](llama.backbone)
    scheduler.add(session)
    scheduler.cancel(session)
    assert closed


def test_drift_found_before_a_restart_is_given_once() -> None:
    """KV memory is full right after the event, which came behind the last step."""
    script = [step(0), DriftFound(1, 0.1, 0.2), one_pass(), step(1), one_pass()]
    first, last = Scripted(step(0), *[one_pass()] * 6), Scripted(*script)
    calls = 0

    def forward(rows: Any, lo: int, hi: int, mlp: bool) -> list[None]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise MemoryFullError("full")
        return [None] * len(rows)

    scheduler = Scheduler[Scripted](engine(forward=forward))
    scheduler.add(first)
    scheduler.add(last)
    events = [event for one, event in scheduler if one is last]
    assert [type(event) for event in events] == [Step, DriftFound, Step]


def test_events_keep_their_order_while_a_stop_string_may_come() -> None:
    draft = Drafted(Draft(1, "x", 0, "memory"))
    events: list[Event] = [step(0, "a"), step(1, "EN"), draft, DriftFound(2, 0.1, 0.2), step(2, "x")]
    stops = StopStrings(("END",))
    shown = [stops.push(event) for event in events]
    assert shown == [[events[0]], [], [], [], events[1:]]
    stops = StopStrings(("END",))
    shown = [stops.push(event) for event in [*events[:4], step(2, "D")]]
    assert shown == [[events[0]], [], [], [], []]
    assert stops.hit == "END"


def test_what_a_driver_does_between_passes_is_no_cost_of_a_pass(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from adi.decoding.drafting.cost_model import CostModel

    noted: list[float] = []
    monkeypatch.setattr(CostModel, "passed", lambda self, rows, seconds: noted.append(seconds))
    adi.generate(llama, [1, 2, 3], adi.Verified(), max_new_tokens=2, stop_at_eos=False)
    noted.clear()
    one, two = (adi.Session(llama, p, adi.Verified(), max_new_tokens=5, stop_at_eos=False) for p in PROMPTS[:2])
    with Scheduler[adi.Session](llama.backbone) as scheduler:
        scheduler.add(one)
        scheduler.add(two)
        scheduler.step()
        scheduler.step()
        assert not noted, "prompts tell nothing"
        scheduler.step()  # drafts
        scheduler.step()  # the pass is shared ...
        scheduler.cancel(two)
        scheduler.step()  # ... and the head not
        assert not noted
        while scheduler.busy:
            scheduler.step()
            time.sleep(0.3)
    assert noted
    assert max(noted) < 0.3


def test_the_drafter_has_run_before_the_clock_starts(llama: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from adi.decoding import policies

    ran: list[Drafting] = []
    monkeypatch.setattr(policies, "cost_model_of", lambda *_: policies.CostModel({1: 1.0}))  # as if read from disk
    monkeypatch.setattr(Drafting, "try_once", lambda self: ran.append(self))
    exits = exits_with_drafter(llama)
    for policy in (adi.Verified(exits), adi.Static(exits, 0, 2)):
        for _ in range(2):
            adi.Session(llama, [1], policy, max_new_tokens=1)
    assert len(ran) == 1


def test_exits_without_a_drafter_leave_the_rest_to_the_controller(llama: adi.Model) -> None:
    bare = adi.bare_exits(llama, (2, 4))
    assert adi.Verified(bare).adaptive
    assert not adi.Verified(bare, adi.Always((2,))).adaptive
    assert not adi.Verified(bare, draft_tokens=3).adaptive
    text = adi.generate(llama, [7, 7, 7, 7], adi.Verified(bare), max_new_tokens=30, stop_at_eos=False)
    alone = adi.generate(llama, [7, 7, 7, 7], adi.FullDepth(), max_new_tokens=30, stop_at_eos=False)
    assert text.token_ids == alone.token_ids
    assert {one.level for one in text.steps} <= {"memory", "full"}
