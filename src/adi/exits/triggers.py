"""Triggers decide from signals whether to exit at a depth: pure rules with one threshold, or one per depth.

``AllOf``, ``AnyOf`` and ``Weighted`` combine signals. Every rule of this module goes to JSON and back.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from msgspec import UNSET, UnsetType
from msgspec.structs import force_setattr, replace

from adi.arguments import whole
from adi.errors import UsageError
from adi.exits.signals import require_signal
from adi.schema import Natural, Record, from_json

PerDepth = float | Mapping[int, float]
MOST_NESTED = 16


class Trigger(Protocol):
    """A rule. ``signals`` maps names to values at one row; a rule reads only the names it lists in ``needs``."""

    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def depths(self) -> frozenset[int]:
        """The depths that have thresholds of their own."""
        ...

    def may_fire(self, depth: int) -> bool:
        """Whether any signals could make this rule fire at ``depth``; where none can, the exit head is not run."""
        ...

    def fires(self, signals: Mapping[str, float], depth: int) -> bool: ...

    def to_json(self) -> dict[str, Any]: ...


class _Rule(Record, frozen=True, tag_field="kind"):
    """A rule that reads no signal, has no thresholds by depth and never fires."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    @property
    def depths(self) -> frozenset[int]:
        return frozenset()

    def may_fire(self, depth: int) -> bool:
        return False

    def fires(self, signals: Mapping[str, float], depth: int) -> bool:
        return self.may_fire(depth)


class Threshold(_Rule, frozen=True, tag="threshold"):
    """Fires where one signal is at least as confident as its threshold: entropy at most, everything else at least that.

    ``at`` is one threshold for all depths or a mapping from depth to threshold; a depth without one never fires.
    ``sure_is_high`` says what sure means where the signal leaves that open.
    """

    signal: str
    at: PerDepth
    min_depth: Natural = 0
    sure_is_high: bool | UnsetType = UNSET

    def __post_init__(self) -> None:
        require_signal(self.signal)
        _check_thresholds(self, f"the threshold of {self.signal}")

    @property
    def high(self) -> bool:
        """Whether a high value means sure."""
        return require_signal(self.signal).sure_is_high if isinstance(self.sure_is_high, UnsetType) else self.sure_is_high

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.signal,)

    @property
    def depths(self) -> frozenset[int]:
        return _own_depths(self)

    def may_fire(self, depth: int) -> bool:
        return _threshold(self, depth) is not None

    def fires(self, signals: Mapping[str, float], depth: int) -> bool:
        threshold = _threshold(self, depth)
        return threshold is not None and require_signal(self.signal).sure(signals[self.signal], threshold, self.high)


class Weighted(_Rule, frozen=True, tag="weighted"):
    """Fires where ``sigmoid(bias + sum of weight x signal)``, a learned chance of being right, reaches its threshold."""

    weights: Mapping[str, float]
    bias: float
    at: PerDepth
    min_depth: Natural = 0

    def __post_init__(self) -> None:
        if not self.weights:
            raise UsageError(f"weights is {self.weights!r}; a weighted trigger needs at least one signal.")
        for name, weight in self.weights.items():
            require_signal(name)
            _number(weight, f"the weight of {name}")
        _number(self.bias, "the bias")
        _check_thresholds(self, "the threshold")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(self.weights)

    @property
    def depths(self) -> frozenset[int]:
        return _own_depths(self)

    def may_fire(self, depth: int) -> bool:
        return _threshold(self, depth) is not None

    def score(self, signals: Mapping[str, float]) -> float:
        """The chance in [0, 1] that the exit's token is the full model's."""
        total = self.bias + sum(weight * signals[name] for name, weight in self.weights.items())
        return 0.5 * (1.0 + math.tanh(0.5 * total))

    def fires(self, signals: Mapping[str, float], depth: int) -> bool:
        threshold = _threshold(self, depth)
        return threshold is not None and self.score(signals) >= threshold


class _Combination(_Rule, frozen=True):
    parts: tuple[Rule, ...]

    def __post_init__(self) -> None:
        force_setattr(self, "parts", tuple(self.parts))
        if not self.parts:
            raise UsageError(f"parts is {self.parts!r}; a combination needs at least one trigger.")
        if _nesting(self) > MOST_NESTED:
            raise UsageError(f"a trigger is nested more than {MOST_NESTED} times.")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.needs))

    @property
    def depths(self) -> frozenset[int]:
        return frozenset().union(*(part.depths for part in self.parts))


class AllOf(_Combination, frozen=True, tag="all"):
    """Fires where every part does. Parts are evaluated in order up to the first that does not: put cheap signals first."""

    def may_fire(self, depth: int) -> bool:
        return all(part.may_fire(depth) for part in self.parts)

    def fires(self, signals: Mapping[str, float], depth: int) -> bool:
        return all(part.fires(signals, depth) for part in self.parts)


class AnyOf(_Combination, frozen=True, tag="any"):
    """Fires where at least one part does. Parts are evaluated in order up to the first that fires: put cheap signals first."""

    def may_fire(self, depth: int) -> bool:
        return any(part.may_fire(depth) for part in self.parts)

    def fires(self, signals: Mapping[str, float], depth: int) -> bool:
        return any(part.fires(signals, depth) for part in self.parts)


class Never(_Rule, frozen=True, tag="never"):
    """Never fires: full depth for every token, and no exit head runs."""


class Always(_Rule, frozen=True, tag="always"):
    """Fires at these depths whatever the signals are, and reads none of them; it never fires elsewhere."""

    at: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.at, Sequence) or not self.at:
            raise UsageError(f"the depths of an always-firing trigger are {self.at!r:.60}; give at least one, such as (8,).")
        force_setattr(self, "at", tuple(whole("a depth of an always-firing trigger", depth, 0) for depth in self.at))

    @property
    def depths(self) -> frozenset[int]:
        return frozenset(self.at)

    def may_fire(self, depth: int) -> bool:
        return depth in self.at


Rule = Threshold | Weighted | AllOf | AnyOf | Never | Always  # what JSON may hold


def with_thresholds(trigger: Trigger, thresholds: PerDepth) -> Trigger:
    """The same rule at other thresholds; UsageError for a combination, whose parts have thresholds of their own."""
    if isinstance(trigger, (Threshold, Weighted)):
        return replace(trigger, at=thresholds)
    raise UsageError(f"thresholds=... fits a rule with one threshold, not {type(trigger).__name__}; give trigger=... instead.")


def trigger_from_json(value: Any) -> Trigger:
    """The rule that ``to_json`` wrote; AdiError, naming what is wrong, for anything else."""
    rule: Trigger = from_json(value, Rule, "the trigger")
    return rule


def _check_thresholds(rule: Threshold | Weighted, what: str) -> None:
    """Refuse thresholds that are no numbers; take a copy of a mapping."""
    at: Any = rule.at
    if isinstance(at, Mapping):
        if bad := [depth for depth in at if isinstance(depth, bool) or not isinstance(depth, numbers.Integral)]:
            raise UsageError(f"{what} maps depths, whole numbers, to thresholds; it has {bad[0]!r:.60}.")
        at = {int(depth): _number(value, f"{what} at depth {depth}") for depth, value in at.items()}
    else:
        at = _number(at, what)
    force_setattr(rule, "at", at)
    force_setattr(rule, "min_depth", whole("min_depth", rule.min_depth, 0))


def _number(value: Any, what: str) -> float:
    try:
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value):
            return float(value)
    except OverflowError:
        pass
    raise UsageError(f"{what} is {value!r:.60}; it must be a number that fits a float.")


def _threshold(rule: Threshold | Weighted, depth: int) -> float | None:
    if depth < rule.min_depth:
        return None
    return rule.at.get(depth) if isinstance(rule.at, Mapping) else rule.at


def _own_depths(rule: Threshold | Weighted) -> frozenset[int]:
    return frozenset(rule.at) if isinstance(rule.at, Mapping) else frozenset()


def _nesting(trigger: object) -> int:
    return 1 + max(map(_nesting, trigger.parts)) if isinstance(trigger, _Combination) else 0
