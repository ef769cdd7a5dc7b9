"""Eight prompts together against one after the other, in turn: ``python tools/batch.py OUT.json``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import adi
from adi.prompts import read_prompts, spread

TOKENS, PAIRS, PROMPTS = 64, 3, 8


def measured(precision: str, prompts: list[str]) -> dict[str, Any]:
    model = adi.load(backend="openvino", precision=precision)
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "stop_at_eos": False}
    adi.generate_batch(model, prompts, max_new_tokens=4)
    one, many, same = [], [], True
    for _ in range(PAIRS):
        start = time.perf_counter()
        alone = [adi.generate(model, prompt, **options) for prompt in prompts]
        middle = time.perf_counter()
        together = adi.generate_batch(model, prompts, **options)
        one.append(middle - start)
        many.append(time.perf_counter() - middle)
        same &= [g.token_ids for g in alone] == [g.token_ids for g in together]
    ratios = [a / b for a, b in zip(one, many, strict=True)]
    return {
        "precision": precision,
        "one_tokens_per_second": PROMPTS * TOKENS / median(one),
        "batch_tokens_per_second": PROMPTS * TOKENS / median(many),
        "median": median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "same": same,
    }


def main(out: Path) -> None:
    prompts = [item.prompt for item in spread(read_prompts("bench"), PROMPTS)]
    found = [measured(precision, prompts) for precision in ("int4", "int8", "fp32")]
    about = {"command": f"python tools/batch.py {out}", "prompts": PROMPTS, "max_new_tokens": TOKENS, "pairs": PAIRS}
    out.write_text(json.dumps({"format": "adi-batch", **about, "precisions": found}, indent=1) + "\n")
    print(*found, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
