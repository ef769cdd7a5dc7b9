"""The page of ``adi habituate``, as HTML that asks nothing of any network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adi.measure.habits.run import verdict
from adi.measure.pages import render

WIDE, HIGH, LEFT, HEAD = 420.0, 150.0, 50.0, 14.0
LEVELS = ("memory", "drafter", "full")


def habits_page(document: Mapping[str, Any]) -> str:
    """The whole page of a result document."""
    curve, repetitions = document["curve"], document["repetitions"]
    return render(
        "habits.html",
        result=document,
        verdict=verdict(document),
        curve=chart([(str(row["prompts"]), row["by_cost"]) for row in curve]),
        passes=chart([(str(row["prompts"]), [row["tokens_per_pass"]] * 3) for row in curve]),
        repetitions=chart([(str(row["repetition"]), [row["tokens_per_pass"]] * 3) for row in repetitions]),
        levels=LEVELS,
        texts=[(name, document["text"]["written"][name], shares(document["text"]["written"][name])) for name in WRITTEN],
        depths=[(name, spelled(document["text"], name)) for name in WRITTEN],
    )


WRITTEN = ("before", "after")


def shares(written: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of a text's tokens by who wrote them."""
    return {level: sum(by == level for _, by in written) / max(1, len(written)) for level in LEVELS}


def spelled(text: Mapping[str, Any], name: str) -> list[tuple[str, int, float]]:
    """Tokens with the shallowest depth that says each, and that as a share of all depth."""
    words = (word for word, _ in text["written"][name])
    return [(word, depth, depth / text["layers"]) for word, depth in zip(words, text["depth"][name], strict=False)]


def chart(points: Sequence[tuple[str, Sequence[float]]]) -> dict[str, Any]:
    """Places of points with their intervals, evenly from left to right, from 0 up to the largest."""
    most = max((high for _, (_, _, high) in points), default=1.0) * 1.08 or 1.0

    def y(value: float) -> float:
        return HEAD + HIGH * (1 - value / most)

    step = WIDE / max(1, len(points) - 1)
    places = [
        {"x": LEFT + i * step, "label": label, "value": value, "y": y(value), "low": y(low), "high": y(high)}
        for i, (label, (value, low, high)) in enumerate(points)
    ]
    ticks = [(y(most * part / 4), f"{most * part / 4:.1f}") for part in range(5)]
    return {"points": places, "ticks": ticks, "width": LEFT + WIDE + 30, "height": HEAD + HIGH + 24, "left": LEFT}
