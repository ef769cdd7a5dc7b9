"""The adaptive proposer driven by a script: whatever is drafted, exactly the truth; and which n-gram source is used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from adi.decoding.drafting.controller import Controller, DraftChoice, PassShare
from adi.decoding.drafting.proposers import ControlledProposer, NgramSources
from adi.decoding.drafting.rounds import DraftRound, draft_together
from adi.decoding.requests import Emitted, Forward, Request
from adi.decoding.speculate import Strategy, speculate
from adi.drafters.ngram import NgramIndex, NgramMatch
from scripted import ScriptedDrafter, UntaughtCosts

LAYERS, END = 10, 99
TRUTH = st.lists(st.integers(1, 5), min_size=40, max_size=40)
COSTS = st.builds(lambda one, more, draft: UntaughtCosts({1: one, 16: one + more}, draft), *[st.floats(0.01, 9)] * 3)


@dataclass(frozen=True)
class Said:
    token: int
    depth: int = LAYERS
    signals: Any = field(default_factory=dict)


def run(
    wanted: Request, truth: list[int], drafts: list[tuple[int, float]], costs: UntaughtCosts, memory: bool
) -> list[Emitted]:
    """Answer from ``truth``; off the true path full depth says 0. The drafter says what ``drafts`` says, in turn."""
    ids, final, said = list[int](), list(wanted.prompt), list[Emitted]()
    guesses = itertools.cycle(drafts)
    reply = None
    sources = NgramSources((), NgramIndex() if memory else None)
    sequence = speculate(wanted, Strategy(ControlledProposer(wanted, Controller(costs), sources, True), 15))
    while True:
        try:
            item = next(sequence) if reply is None else sequence.send(reply)
        except StopIteration:
            return said
        reply = None
        if isinstance(item, Forward):
            ids[item.keep :] = item.ids
            whole = [*wanted.prompt, *truth]
            rows = range(len(ids) - item.read, len(ids))
            reply = [Said(whole[r + 1] if ids[: r + 1] == whole[: r + 1] else 0) for r in rows]
        elif isinstance(item, DraftRound):
            assert (item.position, item.last) == (len(final), final[-1])
            item.drafting = ScriptedDrafter(lambda _, place: next(guesses))  # type: ignore[assignment]
            item.state = item.drafting.start(0)
            draft_together([item])
        elif isinstance(item, Emitted):
            final.append(item.token)
            said.append(item)


@given(
    TRUTH,
    st.lists(st.tuples(st.sampled_from([1, 2, 3, END]), st.floats(0, 1)), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 30),
    st.none() | st.integers(0, 29),
    COSTS,
    st.booleans(),
)
def test_it_says_exactly_the_truth_whoever_drafts(truth, drafts, prompt, budget, end, costs, memory) -> None:
    if end is not None:
        truth[end] = END
    wanted = Request(tuple(range(1, prompt + 1)), budget, LAYERS, lambda token: token == END)
    said = run(wanted, truth, drafts, costs, memory)
    assert [d.token for d in said] == truth[: budget if end is None else min(budget, end + 1)]
    assert {d.draft.level for d in said if d.draft} <= {"memory", "drafter"}


@dataclass
class Other:
    recall: NgramMatch | None

    def find(self, text: Sequence[int], most: int) -> NgramMatch | None:
        return self.recall


def test_every_source_that_has_a_match_is_used() -> None:
    text = [1, 2, 3, 9, 2, 3]  # a run of two tokens came before, and 9 after it
    other = NgramMatch((7, 8), 3, "history")
    own, theirs = NgramSources([Other(None), Other(other)]).find(text, 3)
    assert (own.tokens[0], own.matched, own.source) == (9, 2, "context")
    assert theirs == other
    assert NgramSources([Other(other)]).find([1, 2, 3], 3) == [other], "nothing in the text"
    assert NgramSources([Other(other)], None).find(text, 3) == [other], "the text is not asked"
    assert NgramSources([Other(None)]).find([1, 2, 3], 3) == []
    assert NgramSources().find(text, 0) == []


def test_the_controller_takes_the_memory_that_was_right_before() -> None:
    share = PassShare.alone(costs := UntaughtCosts({1: 1.0, 16: 1.1}))
    controller = Controller(costs)
    good, bad = NgramMatch((1,) * 8, 2, "datastore"), NgramMatch((2,) * 8, 8, "context")
    assert controller.choose([good, bad], False, 8, share).match is bad, "a run of eight in the text is rarely wrong"
    for _ in range(12):
        controller.update(DraftChoice("memory", 8, bad), [], 8, 0, 0.0)
        controller.update(DraftChoice("memory", 8, good), [], 8, 8, 0.0)
    assert controller.choose([good, bad], False, 8, share).match is good


def rounds_of(costs: UntaughtCosts, count: int, accepted: int = 0) -> list[list[int]]:
    """Drafts of so many rounds with a drafter that is always sure."""
    controller, found = Controller(costs), []
    for _ in range(count):
        one = DraftRound(controller, [], True, 9, 1, 5, lambda token: False)
        one.drafting = ScriptedDrafter(lambda _, place: (2, 0.99))  # type: ignore[assignment]
        one.state = one.drafting.start(0)
        draft_together([one])
        controller.update(one.choice, one.confidences, len(one.tokens), min(accepted, len(one.tokens)), one.seconds)
        found.append(one.tokens)
    return found


def test_a_chain_goes_as_far_as_the_round_allows() -> None:
    """How far is decided after each draft, by its confidence."""
    assert rounds_of(UntaughtCosts({1: 1.0, 16: 1.01}, draft_seconds=0.01), 1) == [[2] * 9]


def test_an_exploratory_look_of_the_drafter_is_one_draft() -> None:
    """However sure the drafter is: it has not paid so far, and one more draft costs more than it gives."""
    assert {len(tokens) for tokens in rounds_of(UntaughtCosts({1: 1.0, 16: 30.0}, draft_seconds=1.0), 200)} == {0, 1}
