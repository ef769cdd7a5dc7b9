"""Which rule, at which exits, with which threshold and draft length gives most tokens per second.

Chosen on one set of texts, reported on another. A rule fires where its calibrated chance of being right is at least some
number, one for all depths, which isotonic regression turns into a threshold of the signal for each depth.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from msgspec import UNSET
from torch import Tensor

from adi.exits.signals import SIGNALS
from adi.exits.triggers import AllOf, Always, Threshold, Trigger
from adi.measure.statistics import IsotonicCurve, isotonic_curve, weighted_auroc
from adi.measure.trigger_study.exit_table import ExitTable, reads_head
from adi.measure.trigger_study.pass_seconds import PassSeconds
from adi.measure.trigger_study.simulate import RecordedText, SimulatedRounds, simulate

CHANCES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DRAFTS = (1, 2, 3, 4, 6)
FIRST_DRAFTS = 2  # with which stops are compared first
KEPT = 4
STATIC, ORACLE, GATED = "static", "oracle", "state_probe, then top_probability"
# The signals that a rule reads, one after the other, each with the share of the rule's chance that it must reach.
GATES: dict[str, tuple[tuple[str, float], ...]] = {
    STATIC: (),
    ORACLE: (),
    GATED: (("state_probe", 0.5), ("top_probability", 1.0)),  # from half the chance on running the head is worth it
}


@dataclass(frozen=True)
class RuleChoice:
    """One way to draft: the rule's name, the exits it checks, the chance it asks for (None: none), drafts a round."""

    rule: str
    stops: tuple[int, ...]
    chance: float | None
    draft_tokens: int


@dataclass(frozen=True)
class RuleEstimate(RuleChoice):
    """A choice made on calibrating texts, and what it comes to on the others; ``ratio`` against full depth there.

    ``calibrating_ratio`` is the same where it was chosen. ``trigger`` is the rule as ``Trigger`` JSON, None where it has none.
    """

    tokens_per_second: float
    ratio: float
    calibrating_ratio: float
    tokens_per_round: float
    accepted_share: float | None
    trigger: dict[str, Any] | None


@dataclass(frozen=True)
class SearchData:
    """Everything that rules are compared on: tables by depth, the rows of each text in order, which texts calibrate, seconds to
    measure each signal by depth, and what passes take."""

    tables: Mapping[int, ExitTable]
    lengths: Sequence[int]
    calibrates: Sequence[bool]
    seconds: Mapping[int, Mapping[str, float]]
    passes: PassSeconds


def sure_is_high(name: str, tables: Mapping[int, ExitTable]) -> bool:
    """What sure means for a signal at these exits: where that is open, what calibrating rows say. What is no signal by name is
    a chance."""
    if name not in SIGNALS or not SIGNALS[name].open:
        return name not in SIGNALS or SIGNALS[name].sure_is_high
    known = [(rows.signals[name][rows.calibrates_N], rows.right_N[rows.calibrates_N]) for rows in tables.values()]
    won, pairs = zip(*(weighted_auroc(value, right, np.ones((1, len(right)))) for value, right in known), strict=True)
    return bool(sum(won) * 2 >= sum(pairs))


def confidence(name: str, values_N: Tensor, tables: Mapping[int, ExitTable]) -> Tensor:
    """The signal so that higher is surer."""
    return values_N if sure_is_high(name, tables) else -values_N


def best_rules(data: SearchData) -> list[RuleEstimate]:
    """The best choice of every rule, fastest on the testing texts first."""
    names = [name for name in next(iter(data.tables.values())).signals if name in SIGNALS]
    rules = [STATIC, ORACLE, *names, *([GATED] if "state_probe" in names else [])]
    return sorted((_RuleSearch(data, rule).best() for rule in rules), key=lambda one: -one.tokens_per_second)


class _RuleSearch:
    """One rule over the recorded texts; its chances are computed once for each depth."""

    def __init__(self, data: SearchData, rule: str) -> None:
        self.data, self.rule = data, rule
        self.gates = GATES.get(rule, ((rule, 1.0),))
        self._curves: dict[tuple[int, str], IsotonicCurve] = {}
        self._chances: dict[tuple[int, str], Tensor] = {}
        for (depth, rows), (name, _) in itertools.product(data.tables.items(), self.gates):
            score_N = confidence(name, rows.signals[name], data.tables)
            curve = isotonic_curve(score_N[rows.calibrates_N], rows.right_N[rows.calibrates_N])
            self._curves[depth, name], self._chances[depth, name] = curve, torch.from_numpy(curve.chance(score_N))
        self.run = functools.cache(self._run)

    def best(self) -> RuleEstimate:
        """Stops and chance first, at a usual number of drafts; then the number of drafts for the best few."""
        chances: tuple[float | None, ...] = CHANCES if self.gates else (None,)

        def speed(choice: RuleChoice) -> float:
            return self.run(choice, True).tokens_per_second

        first = [RuleChoice(self.rule, stops, c, FIRST_DRAFTS) for stops in self._stops() for c in chances]
        kept = sorted(first, key=speed, reverse=True)[:KEPT]
        best = max((replace(c, draft_tokens=n) for c, n in itertools.product(kept, DRAFTS)), key=speed)
        here, full_seconds = self.run(best, False), self.data.passes.full()
        trigger = self._trigger(best)
        return RuleEstimate(
            **asdict(best),
            tokens_per_second=here.tokens_per_second,
            ratio=here.tokens_per_second * full_seconds,
            calibrating_ratio=speed(best) * full_seconds,
            tokens_per_round=here.tokens / here.rounds if here.rounds else 0.0,
            accepted_share=here.accepted / here.drafted if here.drafted else None,
            trigger=None if trigger is None else trigger.to_json(),
        )

    def _stops(self) -> Iterator[tuple[int, ...]]:
        """One exit, two of every other one, or a chain of every other one; a fixed depth is one."""
        depths = sorted(self.data.tables)
        yield from ((depth,) for depth in depths)
        if self.rule != STATIC:
            yield from itertools.combinations(depths[::2], 2)
            yield from (tuple(depths[i::2]) for i in (0, 1) if len(depths[i::2]) > 2)

    def _run(self, choice: RuleChoice, calibrating: bool) -> SimulatedRounds:
        recorded = zip(self._recorded(choice), self.data.calibrates, strict=True)
        texts = [text for text, calibrates in recorded if calibrates == calibrating]
        return simulate(texts, choice.stops, choice.draft_tokens, self.data.passes)

    def _recorded(self, choice: RuleChoice) -> list[RecordedText]:
        checks = [self._check(depth, choice.chance) for depth in choice.stops]
        fires, seconds = (torch.stack(column, 1).tolist() for column in zip(*checks, strict=True))
        right = torch.stack([self.data.tables[depth].right_N for depth in choice.stops], 1).tolist()
        ends = list(itertools.accumulate(self.data.lengths, initial=0))
        return [RecordedText(right[a:b], fires[a:b], seconds[a:b]) for a, b in itertools.pairwise(ends)]

    def _check(self, depth: int, chance: float | None) -> tuple[Tensor, Tensor]:
        """Whether the rule fires, and the seconds that its check takes; where it fires the head has run, for the token."""
        rows, seconds = self.data.tables[depth], self.data.seconds[depth]
        fires_N = rows.right_N if self.rule == ORACLE else torch.ones_like(rows.right_N)
        seconds_N = torch.zeros(len(fires_N), dtype=torch.double)
        for name, share in self.gates:
            seconds_N += fires_N * seconds[name]
            fires_N = fires_N & (self._chances[depth, name] >= share * (chance or 0.0))
        if not any(reads_head(name) for name, _ in self.gates):
            seconds_N += fires_N * seconds["head"]
        return fires_N, seconds_N

    def _trigger(self, choice: RuleChoice) -> Trigger | None:
        """The rule for use; None for an oracle."""
        if self.rule == ORACLE:
            return None
        rules = [self._threshold(name, choice.stops, share * (choice.chance or 0.0)) for name, share in self.gates]
        if not rules:
            return Always(choice.stops)
        return rules[0] if len(rules) == 1 else AllOf(tuple(rules))

    def _threshold(self, name: str, stops: Sequence[int], chance: float) -> Threshold:
        known = {depth: self._curves[depth, name].least(chance) for depth in stops}
        high = sure_is_high(name, self.data.tables)
        at = {depth: value if high else -value for depth, value in known.items() if value is not None}
        return Threshold(name, at, sure_is_high=high if SIGNALS[name].open else UNSET)
