"""Numbers that callers give, of whatever library's kind, and one sentence for those that have no meaning."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

from adi.errors import UsageError


def whole(name: str, value: Any, least: int, most: int | None = None, otherwise: str = "") -> int:
    """The value as an int; UsageError unless it is a whole number from ``least`` (to ``most``). ``otherwise`` ends the
    sentence."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UsageError(f"{name} is {value!r:.60}; it must be a whole number {limits}{otherwise}.")
    return number


def real(name: str, value: Any, allowed: str, fits: Callable[[float], bool]) -> float:
    """The value as a finite float (an int stays one); UsageError unless it ``fits``, which ``allowed`` says in words."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and fits(number)):
        raise UsageError(f"{name} is {value!r:.60}; it must be a number {allowed}.")
    return value if type(value) is int else number


def instance(name: str, value: Any, kind: type, advice: str) -> None:
    """UsageError, with what to give, for a value of another type."""
    if not isinstance(value, kind):
        shown = f"{value!r:.60}, " if isinstance(value, (str, int, float, type)) else ""
        raise UsageError(f"{name} is {shown}of type {type(value).__name__}; give {advice}.")


def several(value: Any) -> tuple[Any, ...]:
    """What a list holds, or a value by itself; nothing for None."""
    alone = isinstance(value, (str, bytes)) or not hasattr(value, "__iter__")
    return () if value is None else (value,) if alone else tuple(value)


def settle(self: Any, **values: Any) -> None:
    """Set checked values in a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(self, name, value)
