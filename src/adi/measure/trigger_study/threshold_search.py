"""Which rule, at which exits, with which threshold and how many drafts gives most tokens per second: chosen on one set of
texts, told on another.

A rule fires where its calibrated chance of being right is at least some number, one for all depths, which isotonic regression
turns into a threshold of the signal for each depth.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from adi.exits.signals import SIGNALS
from adi.exits.triggers import AllOf, Always, Threshold, Trigger
from adi.measure.trigger_study.confidence import Rising, isotonic
from adi.measure.trigger_study.exit_table import ExitTable, reads_head
from adi.measure.trigger_study.simulate import PassSeconds, Recorded, Rounds, drafting

CHANCES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DRAFTS = (1, 2, 3, 4, 6)
FIRST_DRAFTS = 2  # with which stops are compared first
GATE = 0.5  # of the chance asked for: from there on the state alone is worth a look of the head
KEPT = 4
STATIC, ORACLE, GATED = "static", "oracle", "state_probe, then top_probability"


@dataclass(frozen=True)
class RuleChoice:
    """One way to draft: the rule's name, the exits it looks at, the chance it asks for (None: none), drafts a round."""

    rule: str
    stops: tuple[int, ...]
    chance: float | None
    draft_tokens: int


@dataclass(frozen=True)
class Estimate:
    """A choice made on calibrating texts, and what it comes to on the others; ``ratio`` against full depth there.

    ``calibrating_ratio`` is the same where it was chosen. ``trigger`` is the rule as ``Trigger`` JSON, None where it has none.
    """

    rule: str
    stops: tuple[int, ...]
    chance: float | None
    draft_tokens: int
    tokens_per_second: float
    ratio: float
    calibrating_ratio: float
    tokens_per_round: float
    accepted_share: float | None
    trigger: dict[str, Any] | None


@dataclass(frozen=True)
class Field:
    """Everything that rules are compared on: readings by depth, rows of each text in order, which texts calibrate, seconds to
    ask each signal by depth, what passes take, blocks of the model."""

    readings: Mapping[int, ExitTable]
    lengths: Sequence[int]
    calibrates: Sequence[bool]
    asking: Mapping[int, Mapping[str, float]]
    passes: PassSeconds
    layers: int

    def rising(self, depth: int, name: str) -> Rising:
        """How often rows of the calibrating texts were right, by how sure the signal is."""
        rows = self.readings[depth]
        return isotonic(sure(name, rows.signals[name])[rows.calibrates_N], rows.right_N[rows.calibrates_N])


def sure(name: str, values_N: Tensor) -> Tensor:
    """The signal so that higher is surer; what is no signal by name is a chance."""
    return values_N if name not in SIGNALS or SIGNALS[name].sure_is_high else -values_N


def compare(field: Field) -> list[Estimate]:
    """The best choice of every rule, fastest on the testing texts first."""
    names = [name for name in next(iter(field.readings.values())).signals if name in SIGNALS]
    rules = [STATIC, ORACLE, *names, *([GATED] if "state_probe" in names else [])]
    return sorted((_best(field, rule) for rule in rules), key=lambda one: -one.tokens_per_second)


def _best(field: Field, rule: str) -> Estimate:
    """Stops and chance first, at a usual number of drafts; then the number of drafts for the best few."""
    chances: tuple[float | None, ...] = (None,) if rule in (STATIC, ORACLE) else CHANCES
    seen = _Seen(field, rule)
    first = [RuleChoice(rule, stops, chance, FIRST_DRAFTS) for stops in _subsets(field, rule) for chance in chances]
    ranked = sorted(first, key=lambda choice: -seen.run(choice, True).tokens_per_second)[:KEPT]
    finer = [RuleChoice(rule, c.stops, c.chance, drafts) for c, drafts in product(ranked, DRAFTS)]
    best = max(finer, key=lambda choice: seen.run(choice, True).tokens_per_second)
    there, here = seen.run(best, True), seen.run(best, False)
    plain = 1 / field.passes.full(field.layers, 1)
    return Estimate(
        rule=rule,
        stops=best.stops,
        chance=best.chance,
        draft_tokens=best.draft_tokens,
        tokens_per_second=here.tokens_per_second,
        ratio=here.tokens_per_second / plain,
        calibrating_ratio=there.tokens_per_second / plain,
        tokens_per_round=here.tokens / here.rounds if here.rounds else 0.0,
        accepted_share=here.accepted / here.drafted if here.drafted else None,
        trigger=None if (trigger := seen.trigger(best)) is None else trigger.to_json(),
    )


def _subsets(field: Field, rule: str) -> Iterator[tuple[int, ...]]:
    """One exit, two of every other one, or a chain of every other one; a fixed depth is one."""
    depths = sorted(field.readings)
    yield from ((depth,) for depth in depths)
    if rule != STATIC:
        yield from itertools.combinations(depths[::2], 2)
        yield from (tuple(depths[i::2]) for i in (0, 1) if len(depths[i::2]) > 2)


class _Seen:
    """One rule over the recorded texts; its chances are worked out once for each depth."""

    def __init__(self, field: Field, rule: str) -> None:
        self.field, self.rule = field, rule
        self.names = {STATIC: (), ORACLE: (), GATED: ("state_probe", "top_probability")}.get(rule, (rule,))
        self._risings = {(d, n): field.rising(d, n) for d in field.readings for n in self.names}
        self._chances = {(d, n): rising.of(sure(n, field.readings[d].signals[n])) for (d, n), rising in self._risings.items()}
        self._runs: dict[tuple[RuleChoice, bool], Rounds] = {}

    def run(self, choice: RuleChoice, calibrating: bool) -> Rounds:
        key = (choice, calibrating)
        if key not in self._runs:
            texts = [t for t, marked in zip(self._texts(choice), self.field.calibrates, strict=True) if marked == calibrating]
            field = self.field
            self._runs[key] = drafting(texts, choice.stops, field.layers, choice.draft_tokens, field.passes)
        return self._runs[key]

    def _texts(self, choice: RuleChoice) -> list[Recorded]:
        told = [self._at(depth, choice.chance) for depth in choice.stops]
        fires, asking = (torch.stack(column, 1).tolist() for column in zip(*told, strict=True))
        right = torch.stack([self.field.readings[depth].right_N for depth in choice.stops], 1).tolist()
        texts, at = [], 0
        for length in self.field.lengths:
            rows = slice(at, at + length)
            texts.append(Recorded(right[rows], fires[rows], asking[rows]))
            at += length
        return texts

    def _at(self, depth: int, chance: float | None) -> tuple[Tensor, Tensor]:
        """Whether the rule fires, and the seconds that asking takes; who fires has read the head, which names the token."""
        rows, asking = self.field.readings[depth], self.field.asking[depth]
        if chance is None:
            fires_N = torch.ones_like(rows.right_N) if self.rule == STATIC else rows.right_N
            return fires_N, fires_N.double() * asking["head"]  # an oracle asks nobody
        if self.rule == GATED:
            passes_N = self._chances[depth, "state_probe"] >= GATE * chance
            fires_N = passes_N & (self._chances[depth, "top_probability"] >= chance)
            return fires_N, asking["state_probe"] + passes_N.double() * asking["top_probability"]
        fires_N = self._chances[depth, self.rule] >= chance
        late = 0.0 if reads_head(self.rule) else asking["head"]
        return fires_N, asking[self.rule] + fires_N.double() * late

    def trigger(self, choice: RuleChoice) -> Trigger | None:
        """The rule for use; None for an oracle."""
        if self.rule == ORACLE:
            return None
        if choice.chance is None:
            return Always(choice.stops)
        if self.rule == GATED:
            gate = self._threshold("state_probe", choice.stops, GATE * choice.chance)
            return AllOf((gate, self._threshold("top_probability", choice.stops, choice.chance)))
        return self._threshold(self.rule, choice.stops, choice.chance)

    def _threshold(self, name: str, stops: Sequence[int], chance: float) -> Threshold:
        known = {depth: self._risings[depth, name].least(chance) for depth in stops}
        sign = 1.0 if SIGNALS[name].sure_is_high else -1.0
        return Threshold(name, {depth: sign * value for depth, value in known.items() if value is not None})
