"""The page of ``adi plot``: one trace as a self-contained HTML file that asks nothing of any network.

The template (``adi/data/trace.html``) draws in the browser; here its data is gathered and embedded. Everything that a
trace holds is untrusted: it travels as JSON in which no character can end the script element, and as an escaped title.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from adi.decoding.records import Look, Step
from adi.files import write_text
from adi.measure.trace import Trace

_MARK = re.compile(r"@@adi:(title|data|body)@@")
_ESCAPES = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})
_TITLE_LENGTH = 70


def page(trace: Trace) -> str:
    """The whole page as HTML text."""
    return filled("trace.html", {"title": html.escape(_title(trace)), "data": _embedded(_data(trace))})


def filled(template: str, values: Mapping[str, str]) -> str:
    """A template of the package with its marks replaced; the values must be fit for HTML."""
    text = files("adi").joinpath("data", template).read_text(encoding="utf-8")
    # One pass over the template: a text that happens to contain a mark is not filled in again.
    return _MARK.sub(lambda found: values[found[1]], text)


def write_page(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all."""
    write_text(Path(path), page(trace))


def exit_table(trace: Trace) -> list[dict[str, Any]]:
    """One row per depth that is an exit, was looked at or decided a token, full depth last.

    ``looked``: looks there; ``fired``: those that the trigger believed; ``agreed`` and ``fired_agreed``: looks and
    believed looks whose token became the final one; ``entropy``: the looks' mean, None without one; ``tokens``: tokens
    decided there.
    """
    looks: dict[int, list[tuple[Look, Step]]] = {depth: [] for depth in (*trace.depths, trace.layers)}
    tokens = dict.fromkeys(looks, 0)
    for step in trace.steps:
        tokens[step.depth] = tokens.get(step.depth, 0) + 1
        for look in step.looks:
            looks.setdefault(look.depth, []).append((look, step))
    return [_exit_row(depth, looks.get(depth, []), tokens.get(depth, 0)) for depth in sorted({*looks, *tokens})]


def _exit_row(depth: int, seen: list[tuple[Look, Step]], tokens: int) -> dict[str, Any]:
    entropies = [e for look, _ in seen if (e := look.signals.get("entropy")) is not None and math.isfinite(e)]
    agreed = [look for look, step in seen if look.token == step.token]
    return {
        "depth": depth,
        "looked": len(seen),
        "fired": sum(look.fired for look, _ in seen),
        "agreed": len(agreed),
        "fired_agreed": sum(look.fired for look in agreed),
        "entropy": sum(entropies) / len(entropies) if entropies else None,
        "tokens": tokens,
    }


def _first_shown(steps: Iterable[Step]) -> int:
    """The token whose details are open at first: one that replaced a draft, else the one that most depths looked at."""

    def interest(item: tuple[int, Step]) -> tuple[int, int, int]:
        index, step = item
        return min(len(step.rejected), 1), len(step.looks), -index

    return max(enumerate(steps), key=interest, default=(0, None))[0]


def _data(trace: Trace) -> dict[str, Any]:
    """What the page draws from."""
    return {
        "model": trace.model,
        "backend": trace.backend,
        "precision": trace.precision,
        "mode": trace.mode,
        "layers": trace.layers,
        "depths": trace.depths,
        "trigger": trace.trigger,
        "prompt": trace.prompt,
        "summary": trace.summary.to_json(),
        "steps": [step.to_json() for step in trace.steps],
        "exits": exit_table(trace),
        "first": _first_shown(trace.steps),
    }


def _title(trace: Trace) -> str:
    """The prompt on one line and shortened, with the model's name; what cannot be printed is left out."""
    prompt, model = _line(trace.prompt), _line(trace.model)
    short = prompt if len(prompt) <= _TITLE_LENGTH else prompt[: _TITLE_LENGTH - 1] + "…"
    return f"{short or 'Trace'} · {model}"


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _embedded(value: Any) -> str:
    """JSON that may stand inside a script element: ASCII, finite, without ``<``, ``>`` and ``&``."""
    return json.dumps(_plain(value), allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _plain(value: Any) -> Any:
    """The value with floats at six significant digits, and null for those that JSON has no name for."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
