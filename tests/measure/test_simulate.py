"""Drafting worked out from records is the drafting that the real logic does on a staircase of blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adi
from adi.decoding.requests import DraftToken, Emitted, Forward, Request
from adi.exits.triggers import Threshold
from adi.measure.trigger_study.pass_seconds import PassSeconds, measure_passes
from adi.measure.trigger_study.simulate import RecordedText, simulate
from scripted import verified
from support import pass_seconds

LAYERS, STOPS, WRONG = 10, (2, 5, 8), 0
PASSES = pass_seconds(LAYERS, (1, 2, 4, 8), 1.0, (0.2, 0.25, 0.3, 0.5), (0.7, 0.8, 0.9, 1.0))
ROW = st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([0.0, 0.01, 0.5])), min_size=3, max_size=3)
TEXTS = st.lists(ROW, min_size=1, max_size=30)


@dataclass(frozen=True)
class ExitRow:
    depth: int
    token: int
    signals: Any = field(default_factory=dict)


class Twin:
    """A frontier of layers that counts seconds, and exits that say what was recorded."""

    def __init__(self, text: list[Any]) -> None:
        self.text, self.filled, self.length, self.seconds = text, [1] * LAYERS, 1, 0.0

    def serve(self, asked: Forward) -> list[ExitRow]:
        self.filled = [min(f, asked.keep) for f in self.filled]
        self.length = asked.keep + len(asked.ids)
        before_it = 0
        for layer in range(asked.to):  # a pass is a run of layers that stand level
            rows = self.length - self.filled[layer]
            if rows:
                entry = PASSES.through(0, rows)
                self.seconds += PASSES.through(1, rows) - (0.0 if rows != before_it else entry)
            before_it = rows
        before = list(self.filled)
        self.filled[: asked.to] = [self.length] * asked.to
        row = self.length - 1
        if asked.to == LAYERS:
            self.seconds += PASSES.head(asked.read)
            return [ExitRow(LAYERS, at + 1) for at in range(self.length - asked.read, self.length)]
        assert before[asked.to - 1] < self.length
        right, fires, asking = self.text[row][STOPS.index(asked.to)]
        self.seconds += asking
        return [ExitRow(asked.to, row + 1 if right else WRONG, {"margin": 1.0 if fires else 0.0})]


def run(text: list[Any], draft_tokens: int) -> tuple[int, float, int, int, int]:
    """Tokens after the first, seconds without the prompt, rounds, drafts, kept."""
    wanted = Request((9,), len(text), LAYERS, lambda token: False)
    twin, reply, emitted, drafted, begun = Twin(text), None, [], 0, False
    sequence = verified(wanted, draft_tokens, STOPS, Threshold("margin", 0.5))
    while True:
        try:
            item = next(sequence) if reply is None else sequence.send(reply)
        except StopIteration:
            break
        reply = None
        if isinstance(item, Forward):
            reply = twin.serve(item) if begun else [ExitRow(LAYERS, 1)]
            begun = True
        drafted += isinstance(item, DraftToken)
        emitted += [item] if isinstance(item, Emitted) else []
    assert [one.token for one in emitted] == list(range(1, len(text) + 1))
    rounds = emitted[-1].round - 1
    return len(emitted) - 1, twin.seconds, rounds, drafted, sum(one.draft is not None for one in emitted)


@given(TEXTS, st.integers(1, 6))
def test_records_give_what_the_real_logic_gives(text: list[Any], draft_tokens: int) -> None:
    right, fires, asking = ([[cell[i] for cell in row] for row in text] for i in range(3))
    found = simulate([RecordedText(right, fires, asking)], STOPS, draft_tokens, PASSES)
    tokens, seconds, rounds, drafted, accepted = run(text, draft_tokens)
    assert (found.tokens, found.rounds, found.drafted, found.accepted) == (tokens, rounds, drafted, accepted)
    assert found.seconds == pytest.approx(seconds)


def test_a_rule_that_never_fires_costs_full_depth_and_its_looks() -> None:
    text = RecordedText([[True]] * 5, [[False]] * 5, [[0.5]] * 5)
    found = simulate([text], (2,), 4, PASSES)
    looked = 3  # the last token of a text is not drafted for
    assert (found.tokens, found.rounds, found.drafted) == (4, 4, 0)
    assert found.seconds == pytest.approx(4 * PASSES.full() + looked * (0.5 + PASSES.through(0, 1)))


def test_pass_seconds_come_from_two_depths() -> None:
    passes = PassSeconds(10, (1, 3), (1.2, 1.4), (11.0, 13.0), (0.5, 0.6))
    assert passes.through(10, 1) == pytest.approx(11.0)
    assert passes.through(5, 1) == pytest.approx(6.0)
    assert passes.through(10, 2) == pytest.approx(12.0)
    assert passes.full(5) == pytest.approx(15.0 + 0.7), "along the last slope"
    noisy = PassSeconds(10, (1, 2, 4, 8), (1.0,) * 4, (10.0, 14.0, 12.0, 16.0), (0.5, 0.4, 0.6, 0.7))
    assert noisy.entry == 0
    assert [noisy.through(1, n) for n in (1, 2, 4, 8)] == pytest.approx([1.0, 1.2, 1.2, 1.6]), "more rows never cost less"
    assert [noisy.head(n) for n in (1, 2, 4, 8)] == pytest.approx([0.4, 0.4, 0.6, 0.7])
    assert PassSeconds(1, (1,), (1.0,), (1.0,), (0.5,)).through(1, 3) == 1.0


def test_passes_of_a_single_row_count_can_be_measured(tiny_model: adi.Model) -> None:
    passes = measure_passes(tiny_model.backbone, rows=(1,), repeats=3)
    assert passes.full() == pytest.approx(passes.blocks_seconds[0] + passes.head_seconds[0])
