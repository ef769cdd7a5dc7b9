"""What the controller's decisions cost: ``python tools/decisions.py docs/results/decisions.json``.

Verified decoding on bench prompts with a clock around everything the controller is asked and told; a round's decisions
against a pass of one row with its head, as full depth on the same prompt has it.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from statistics import mean, median
from typing import Any

import adi
from adi.decoding.controller import Controller
from adi.files import write_json
from adi.measure.circumstances import circumstances
from adi.prompts import read_prompts, spread

PROMPTS, TOKENS, WARM_UP, PASSES = 8, 128, 16, 32
ASKED = ("stand", "choose", "goes_on", "judged")


def clocked(work: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same, noting how long each call takes."""

    @wraps(work)
    def timed(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return work(*given, **named)
        finally:
            seconds.append(time.perf_counter() - start)

    return timed


def one_pass(model: adi.Model, prompt: str) -> float:
    """Median seconds of a pass of one row and of the head's call after it, while full depth answers."""
    backbone: Any = model.backbone
    times: dict[str, list[float]] = {"forward": [], "greedy": []}
    for name, seconds in times.items():
        setattr(backbone, name, clocked(getattr(backbone, name), seconds))
    try:
        adi.generate(model, prompt, max_new_tokens=PASSES)
    finally:
        for name in times:
            delattr(backbone, name)
    return sum(median(seconds[1:]) for seconds in times.values())  # the prompt's left out


def main(out: Path) -> None:
    items = spread(read_prompts("bench"), PROMPTS)
    spent: dict[str, list[float]] = defaultdict(list)
    for name in ASKED:
        setattr(Controller, name, clocked(getattr(Controller, name), spent[name]))
    rows = []
    for precision in ("int4", "int8"):
        model, exits = adi.load("smollm2-135m", precision=precision), adi.load_exits("smollm2-135m")
        model.backbone.prepare((), drafts=True, wait=True)
        adi.generate(model, items[0].prompt, policy=adi.Verified(exits), max_new_tokens=WARM_UP)
        shares, passes, rounds = [], [], 0
        for item in items:
            for seconds in spent.values():
                seconds.clear()
            done = adi.generate(model, item.prompt, policy=adi.Verified(exits), max_new_tokens=TOKENS)
            rounds += done.counters.rounds
            passes.append(one_pass(model, item.prompt))
            shares.append(sum(map(sum, spent.values())) / done.counters.rounds / passes[-1])
        found = {"pass_seconds": median(passes), "rounds": rounds, "share": median(shares), "most": max(shares)}
        rows.append({"precision": precision, **found})
        print(rows[-1], {name: f"{1e6 * mean(each):.0f} us" for name, each in spent.items()}, flush=True)
    about = circumstances(f"python tools/decisions.py {out}", items)
    write_json(out, {"format": "adi-decisions", **about, "max_new_tokens": TOKENS, "precisions": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
