"""The page of ``adi plot``: one trace as a self-contained HTML file that asks nothing of any network.

The template ``adi/data/trace.html`` draws in the browser; here its data is gathered.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adi.decoding.records import Look, Step
from adi.files import write_text
from adi.measure.pages import render
from adi.measure.trace import Trace, rounded

_TITLE_LENGTH = 70
_ORDER = ("memory", "drafter", "exit", "full")
Level = tuple[str, int]


def trace_page(trace: Trace) -> str:
    """The whole page as HTML text."""
    data = {**trace.to_json(), "levels": level_table(trace), "first": _first_shown(trace.steps)}
    return render("trace.html", title=_title(trace), data=rounded(data))


def plot(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all."""
    write_text(Path(path), trace_page(trace))


def level_table(trace: Trace) -> list[dict[str, Any]]:
    """One row per level that proposed a token or was looked at: memory, drafter, each exit by depth, full depth.

    ``tokens`` are final tokens, ``rejected`` rejected drafts. ``looked`` counts looks there, ``fired`` those that triggered an
    early exit, ``agreed`` and ``fired_agreed`` the looks of each kind whose token became the final one; ``entropy`` is the
    looks' mean, None without one.
    """
    tokens = Counter[Level]({("exit", depth): 0 for depth in trace.depths if depth} | {("full", trace.layers): 0})
    tokens.update((step.level, step.depth) for step in trace.steps)
    rejected = Counter((draft.level, draft.depth) for step in trace.steps for draft in step.rejected)
    looks = defaultdict[Level, list[tuple[Look, Step]]](list)
    for step in trace.steps:
        for look in step.looks:
            level = "full" if look.depth >= trace.layers else "exit" if look.depth else "drafter"
            looks[level, look.depth].append((look, step))
    found = sorted({*tokens, *rejected, *looks}, key=lambda level: (_ORDER.index(level[0]), level[1]))
    return [
        {"level": level, "depth": depth, "tokens": tokens[level, depth], "rejected": rejected[level, depth]}
        | _looks_row(looks[level, depth])
        for level, depth in found
    ]


def _looks_row(looks: list[tuple[Look, Step]]) -> dict[str, Any]:
    entropies = [e for look, _ in looks if (e := look.signals.get("entropy")) is not None and math.isfinite(e)]
    agreed = [look for look, step in looks if look.token == step.token]
    return {
        "looked": len(looks),
        "fired": sum(look.fired for look, _ in looks),
        "agreed": len(agreed),
        "fired_agreed": sum(look.fired for look in agreed),
        "entropy": sum(entropies) / len(entropies) if entropies else None,
    }


def _first_shown(steps: Iterable[Step]) -> int:
    """The token whose details are open at first: one that replaced a draft, else the one that most depths looked at."""

    def interest(item: tuple[int, Step]) -> tuple[int, int, int]:
        index, step = item
        return min(len(step.rejected), 1), len(step.looks), -index

    return max(enumerate(steps), key=interest, default=(0, None))[0]


def _title(trace: Trace) -> str:
    """The prompt on one line and shortened, with the model's name; what cannot be printed is left out."""
    prompt, model = _line(trace.prompt), _line(trace.model)
    short = prompt if len(prompt) <= _TITLE_LENGTH else prompt[: _TITLE_LENGTH - 1] + "…"
    return f"{short or 'Trace'} · {model}"


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
