"""Where sequences share passes, drafting is tried: what it costs beside the passes shows in the clock alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

import adi
from adi.decoding import scheduler
from adi.decoding.drafting.controller import Controller
from adi.decoding.drafting.cost_model import CostModel
from adi.decoding.drafting.proposers import ControlledProposer, NgramSources
from adi.decoding.drafting.rounds import DraftRound, draft_together
from adi.decoding.drafting.trial import KEPT, LEAST, ROWS, TRIED, RoundClock, Trial
from adi.decoding.requests import Request

PASS = 0.02


def worked(trial: Trial, rounds: int, seconds: dict[bool, float], tokens: int = 8, unsteady: float = 0.2) -> list[bool]:
    """The kinds of so many rounds, which take so many seconds by kind, more or less."""
    dice, kinds = random.Random(0), []
    for _ in range(rounds):
        kinds.append(trial.drafts)
        trial.seen(trial.drafts, tokens, seconds[trial.drafts] * dice.uniform(1 - unsteady, 1 + unsteady))
    return kinds


@pytest.mark.parametrize(("drafting", "plain"), [(1.15, 1.0), (1.0, 1.15)])
def test_most_rounds_are_of_the_kind_that_gives_more(drafting: float, plain: float) -> None:
    kinds = worked(Trial(), 2000, {True: drafting, False: plain})
    better = drafting < plain
    assert sum(kind is better for kind in kinds[2 * TRIED :]) >= 0.94 * (2000 - 2 * TRIED)
    assert any(kind is not better for kind in kinds[2 * TRIED :]), "it looks again"


def test_it_follows_when_things_change() -> None:
    trial = Trial()
    worked(trial, 500, {True: 1.3, False: 1.0})
    kinds = worked(trial, 800, {True: 1.0, False: 1.3})
    assert sum(kinds[KEPT + TRIED :]) >= 0.9 * (800 - KEPT - TRIED)


def test_a_pause_of_who_reads_settles_nothing() -> None:
    trial = Trial()
    worked(trial, 100, {True: 1.0, False: 1.2})
    for _ in range(3):
        trial.seen(True, 8, 500.0)
    assert sum(worked(trial, 600, {True: 1.0, False: 1.2})) >= 0.85 * 600


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("sequences", "looking", "pays"), [(2, 0.001, True), (8, 0.008, False), (16, 0.009, False), (4, 0.0, True)]
)
def test_sequences_look_for_drafts_only_where_that_pays(sequences: int, looking: float, pays: bool) -> None:
    """Looking takes so many seconds a round, and one draft in five is right."""
    clock, dice, costs = Clock(), random.Random(1), CostModel({1: PASS, 64: PASS})
    controls, watch = [Controller(costs.copy()) for _ in range(sequences)], RoundClock(clock)
    positions, looked, tokens, rounds = [0] * sequences, 0, 0, 600
    for _ in range(rounds):
        looks = controls[0].looks
        assert looks in (0, max(LEAST, ROWS // sequences)) or not tokens
        watch.begin(costs.correction.trials, dict(enumerate(positions)), 0)
        looked += looks > 0
        clock.now += PASS + looking * (looks > 0)
        for i in range(sequences):
            given = 1 + (looks > 0 and dice.random() < 0.2)
            positions[i] += given
            tokens += given
    assert (looked > 0.9 * rounds) is pays
    assert (looked < 0.15 * rounds) is not pays
    assert tokens / clock.now >= 0.97 * sequences / PASS


def test_a_round_counts_only_where_the_same_sequences_went_through_it_alone() -> None:
    clock, costs = Clock(), CostModel({1: PASS, 64: PASS})
    watch, seen = RoundClock(clock), list[tuple[Any, ...]]()
    costs.correction.trials._by_number[2] = SimpleNamespace(drafts=True, seen=lambda *told: seen.append(told))  # type: ignore[assignment]
    for who, positions, beside in (
        ([0, 1], [5, 5], 0),
        ([0, 1], [6, 8], 0),  # counts
        ([0, 1, 2], [9, 9, 3], 0),  # one more joined
        ([0, 1, 2], [10, 10, 4], 7),  # beside rows of a prompt
        ([0, 1, 2], [11, 11, 5], 0),  # after a round beside them
        ([0, 1, 2], [12, 12, 6], 0),  # counts
    ):
        clock.now += 1.0
        watch.begin(costs.correction.trials, dict(zip(who, positions, strict=True)), beside)
    assert seen == [(True, 4, 1.0), (True, 3, 1.0)]


class Asked:
    """A source of n-grams that notes how far it was asked to look."""

    def __init__(self) -> None:
        self.most = list[int]()

    def find(self, text: Sequence[int], most: int) -> None:
        self.most.append(most)


@pytest.mark.parametrize(("looks", "asked"), [(4, [4]), (ROWS, [15])])
def test_nothing_is_looked_for_beyond_what_the_trial_says(looks: int, asked: list[int]) -> None:
    costs, source = CostModel({1: PASS, 64: PASS}), Asked()
    costs.correction.trials.drafts = looks
    request = Request((1, 2, 3), 40, 10, lambda _: False)
    proposing = ControlledProposer(request, Controller(costs), NgramSources((source,), None), True).propose([1, 2, 3], 15)
    made = next(proposing)
    assert isinstance(made, DraftRound)
    assert source.most == asked
    assert (made.drafter, made.most) == (True, min(looks, 15))


def test_where_drafting_rests_a_round_is_one_of_full_depth(tiny_model: adi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked for, and the driver is asked for nothing but passes."""
    model, rounds, seen = adi.Model(tiny_model.backbone, tiny_model.tokenizer, frozenset()), list[int](), Trial.seen
    monkeypatch.setattr(Trial, "seen", lambda self, drafted, tokens, _: seen(self, drafted, tokens, 9.0 if drafted else 1.0))
    monkeypatch.setattr(
        scheduler, "draft_together", lambda asked, *more: (rounds.append(len(asked)), draft_together(asked, *more))
    )
    options: Any = {"max_new_tokens": 80, "raw": True, "stop_at_eos": False}
    prompts = ["the quick brown fox", "a dog sleeps", "12 plus 30"]
    found = adi.generate_batch(model, prompts, adi.Verified(), **options)
    together = [each for each in rounds if each > 1]  # who is left alone drafts again
    assert TRIED <= len(together) <= TRIED + 6, "then drafting rests"
    wanted = adi.generate_batch(model, prompts, adi.FullDepth(), **options)
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]


def test_a_batch_tries_and_a_lone_text_does_not(tiny_model: adi.Model) -> None:
    """The driver times its rounds: of as many sequences as share its passes."""
    model = adi.Model(tiny_model.backbone, tiny_model.tokenizer, frozenset())
    options: Any = {"max_new_tokens": 30, "raw": True, "stop_at_eos": False}
    wanted = adi.generate(model, "the quick brown fox", adi.Verified(), **options)
    (costs,) = model.notes["costs"].values()
    assert not costs.correction.trials._by_number
    found = adi.generate_batch(model, ["the quick brown fox", "a dog sleeps", "12 plus 30"], adi.Verified(), **options)
    assert found[0].token_ids == wanted.token_ids
    trial = costs.correction.trials._by_number[2]
    assert trial._kinds[True].tokens > 2 * 3, "rounds of two or three sequences"


def test_alone_a_sequence_looks_as_far_as_it_may_and_costs_no_trial() -> None:
    costs = CostModel({1: PASS, 64: PASS})
    control, watch = Controller(costs.copy()), RoundClock(Clock())
    costs.correction.trials.drafts = 0  # others rested just now
    for position in range(5, 50):
        watch.begin(costs.correction.trials, {0: position}, 0)
        assert control.looks == control.drafts
    assert not costs.correction.trials._by_number
