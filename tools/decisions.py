"""What the controller's decisions cost: ``python tools/decisions.py docs/results/decisions.json``.

Verified decoding on bench prompts with a clock around everything the controller is asked and told; a round's decisions
against a pass of one row with its head, as the cost table of this machine has it.
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
from adi.decoding.costs import costs_of
from adi.files import write_json
from adi.measure.circumstances import circumstances
from adi.prompts import read_prompts, spread

PROMPTS, TOKENS, WARM_UP = 8, 128, 16
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


def main(out: Path) -> None:
    items = spread(read_prompts("bench"), PROMPTS)
    spent: dict[str, list[float]] = defaultdict(list)
    for name in ASKED:
        setattr(Controller, name, clocked(getattr(Controller, name), spent[name]))
    rows = []
    for precision in ("int4", "int8"):
        model, exits = adi.load("smollm2-135m", precision=precision), adi.load_exits("smollm2-135m")
        model.backbone.prepare((), drafts=True, wait=True)
        drafting = exits.drafting(model.backbone)
        assert drafting is not None
        one_pass = costs_of(model.backbone, drafting.key, drafting.try_once).rows(1)
        adi.generate(model, items[0].prompt, policy=adi.Verified(exits), max_new_tokens=WARM_UP)
        shares, rounds = [], 0
        for item in items:
            for seconds in spent.values():
                seconds.clear()
            done = adi.generate(model, item.prompt, policy=adi.Verified(exits), max_new_tokens=TOKENS)
            rounds += done.counters.rounds
            shares.append(sum(map(sum, spent.values())) / done.counters.rounds / one_pass)
        rows.append(
            {"precision": precision, "pass_seconds": one_pass, "rounds": rounds, "share": median(shares), "most": max(shares)}
        )
        print(rows[-1], {name: f"{1e6 * mean(each):.0f} us" for name, each in spent.items()}, flush=True)
    about = circumstances(f"python tools/decisions.py {out}", items)
    write_json(out, {"format": "adi-decisions", **about, "max_new_tokens": TOKENS, "precisions": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
