"""When to believe an exit: pure rules over signals, each with a threshold per depth and a minimum depth.

``AllOf``, ``AnyOf`` and ``Weighted`` combine rules and are rules themselves. Every rule goes to JSON and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from adi.errors import AdiError
from adi.exits.signals import require_signal

PerDepth = float | Mapping[int, float]
MOST_NESTED = 16
JOINS: dict[str, Callable[[Iterable[bool]], bool]] = {"all": all, "any": any}


class Trigger(Protocol):
    """A rule. ``signals`` maps names to values at one row; a rule reads only the names it lists in ``needs``."""

    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def depths(self) -> frozenset[int]:
        """The depths that thresholds are given for one by one."""
        ...

    def may_fire(self, depth: int) -> bool:
        """Whether some signal could make this rule fire at ``depth``; a depth where none can is not looked at."""
        ...

    def fires(self, signals: Mapping[str, float], depth: int) -> bool: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Threshold:
    """Fires where one signal is at least as sure as its threshold: entropy at most, everything else at least that.

    ``at`` is one threshold for all depths or a mapping from depth to threshold; a depth without one never fires.
    """

    signal: str
    at: PerDepth
    min_depth: int = 0

    def __post_init__(self) -> None:
        require_signal(self.signal)
        object.__setattr__(self, "at", _per_depth(self.at, f"the threshold of {self.signal}"))
        _not_negative(self.min_depth)

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.signal,)

    @property
    def depths(self) -> frozenset[int]:
        return frozenset(self.at) if isinstance(self.at, Mapping) else frozenset()

    def may_fire(self, depth: int) -> bool:
        return depth >= self.min_depth and _at(self.at, depth) is not None

    def fires(self, signals: Mapping[str, float], depth: int) -> bool:
        threshold = _at(self.at, depth)
        if depth < self.min_depth or threshold is None:
            return False
        return require_signal(self.signal).sure(signals[self.signal], threshold)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "threshold", "signal": self.signal, "at": _at_json(self.at), "min_depth": self.min_depth}


@dataclass(frozen=True)
class Combination:
    """Rules joined by ``all`` or ``any``. Parts are asked in order, as long as the answer is open: put cheap signals first."""

    parts: tuple[Trigger, ...]
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        if not self.parts:
            raise AdiError("a combination needs at least one trigger.")
        object.__setattr__(self, "parts", tuple(self.parts))

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.needs))

    @property
    def depths(self) -> frozenset[int]:
        return frozenset().union(*(part.depths for part in self.parts))

    def may_fire(self, depth: int) -> bool:
        return JOINS[self.kind](part.may_fire(depth) for part in self.parts)

    def fires(self, signals: Mapping[str, float], depth: int) -> bool:
        return JOINS[self.kind](part.fires(signals, depth) for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "parts": [part.to_json() for part in self.parts]}


class AllOf(Combination):
    """Fires where every part does."""

    kind = "all"


class AnyOf(Combination):
    """Fires where at least one part does."""

    kind = "any"


@dataclass(frozen=True)
class Weighted:
    """Fires where ``sigmoid(bias + sum of weight x signal)``, a learned chance of being right, reaches its threshold."""

    weights: Mapping[str, float]
    bias: float
    at: PerDepth
    min_depth: int = 0

    def __post_init__(self) -> None:
        if not self.weights:
            raise AdiError("a weighted trigger needs at least one signal.")
        for name, weight in self.weights.items():
            require_signal(name)
            _number(weight, f"the weight of {name}")
        _number(self.bias, "the bias")
        object.__setattr__(self, "at", _per_depth(self.at, "the threshold"))
        _not_negative(self.min_depth)

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(self.weights)

    @property
    def depths(self) -> frozenset[int]:
        return frozenset(self.at) if isinstance(self.at, Mapping) else frozenset()

    def may_fire(self, depth: int) -> bool:
        return depth >= self.min_depth and _at(self.at, depth) is not None

    def score(self, signals: Mapping[str, float]) -> float:
        """The chance in [0, 1] that this rule gives the exit's token of being the full model's."""
        total = self.bias + sum(weight * signals[name] for name, weight in self.weights.items())
        return 0.5 * (1.0 + math.tanh(0.5 * total))

    def fires(self, signals: Mapping[str, float], depth: int) -> bool:
        threshold = _at(self.at, depth)
        return depth >= self.min_depth and threshold is not None and self.score(signals) >= threshold

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "weighted",
            "weights": dict(self.weights),
            "bias": self.bias,
            "at": _at_json(self.at),
            "min_depth": self.min_depth,
        }


@dataclass(frozen=True)
class Never:
    """Never fires: full depth for every token, and not one look on the way."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    @property
    def depths(self) -> frozenset[int]:
        return frozenset()

    def may_fire(self, depth: int) -> bool:
        return False

    def fires(self, signals: Mapping[str, float], depth: int) -> bool:
        return False

    def to_json(self) -> dict[str, Any]:
        return {"kind": "never"}


@dataclass(frozen=True)
class Always:
    """Fires at these depths whatever the signals say, and reads none of them; it never fires elsewhere."""

    at: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.at or not all(type(depth) is int for depth in self.at):
            raise AdiError(f"the depths of an always-firing trigger are whole numbers, at least one, got {self.at!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    @property
    def depths(self) -> frozenset[int]:
        return frozenset(self.at)

    def may_fire(self, depth: int) -> bool:
        return depth in self.at

    def fires(self, signals: Mapping[str, float], depth: int) -> bool:
        return depth in self.at

    def to_json(self) -> dict[str, Any]:
        return {"kind": "always", "at": list(self.at)}


def with_thresholds(trigger: Trigger, thresholds: PerDepth) -> Trigger:
    """The same rule at other thresholds; ValueError for a combination, whose parts have thresholds of their own."""
    if isinstance(trigger, (Threshold, Weighted)):
        return replace(trigger, at=thresholds)
    raise AdiError(f"thresholds=... fits a rule with one threshold, not {type(trigger).__name__}; give trigger=... instead.")


def trigger_from_json(value: Any, nested: int = 0) -> Trigger:
    """The rule that ``to_json`` wrote; ValueError, naming what is wrong, for anything else. ``nested``: in so many others."""
    if nested > MOST_NESTED:
        raise AdiError(f"a trigger is nested more than {MOST_NESTED} times.")
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str) or value["kind"] not in _FIELDS:
        got = repr(value.get("kind"))[:100] if isinstance(value, dict) else type(value).__name__
        raise AdiError(f"a trigger is an object with 'kind' in {', '.join(_FIELDS)}, got {got}.")
    fields = _FIELDS[value["kind"]]
    if set(value) != {"kind", *fields}:
        raise AdiError(f"trigger {value['kind']!r} has the fields {sorted(fields)}, got {sorted(set(value) - {'kind'})}.")
    if value["kind"] == "never":
        return Never()
    if value["kind"] == "always":
        return Always(tuple(value["at"]) if isinstance(value["at"], list) else ())
    if value["kind"] in ("all", "any"):
        if not isinstance(value["parts"], list):
            raise AdiError(f"'parts' of trigger {value['kind']!r} is a list of triggers.")
        parts = tuple(trigger_from_json(part, nested + 1) for part in value["parts"])
        return AllOf(parts) if value["kind"] == "all" else AnyOf(parts)
    if type(value["min_depth"]) is not int:
        raise AdiError(f"min_depth is a whole number, got {value['min_depth']!r}.")
    if value["kind"] == "threshold":
        return Threshold(value["signal"], value["at"], value["min_depth"])
    if not isinstance(value["weights"], dict):
        raise AdiError("'weights' of a weighted trigger maps signals to numbers.")
    return Weighted(value["weights"], value["bias"], value["at"], value["min_depth"])


_FIELDS: dict[str, tuple[str, ...]] = {
    "threshold": ("signal", "at", "min_depth"),
    "all": ("parts",),
    "any": ("parts",),
    "weighted": ("weights", "bias", "at", "min_depth"),
    "never": (),
    "always": ("at",),
}


def _not_negative(min_depth: int) -> None:
    if type(min_depth) is not int or min_depth < 0:
        raise AdiError(f"min_depth is {min_depth!r}; it must be a whole number of at least 0.")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise AdiError(f"{what} is {value!r}; it must be a number.")
    try:
        return float(value)
    except OverflowError:
        raise AdiError(f"{what} is a whole number too large for any threshold.") from None


def _per_depth(value: Any, what: str) -> PerDepth:
    if not isinstance(value, Mapping):
        return _number(value, what)
    try:
        return {int(depth): _number(v, f"{what} at depth {depth}") for depth, v in value.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise AdiError(f"{what} maps depths to numbers: {error}") from None


def _at(at: PerDepth, depth: int) -> float | None:
    return at.get(depth) if isinstance(at, Mapping) else at


def _at_json(at: PerDepth) -> Any:
    return {str(depth): value for depth, value in at.items()} if isinstance(at, Mapping) else at
