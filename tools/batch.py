"""Eight prompts together against one after the other, in turn: ``python tools/batch.py OUT.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from adi.measure.bench import Extent, bench
from adi.measure.contestants import Setting
from adi.prompts import read_prompts, spread

TOKENS, PAIRS, PROMPTS = 128, 3, 8
PRECISIONS = ("int4", "int8", "fp32")


def main(out: Path) -> None:
    """What ``adi bench --batch`` finds, as the file that README's table is made of.

    Of three pairs the interval is from the lowest to the highest.
    """
    items = spread(read_prompts("bench"), PAIRS * PROMPTS)
    setting = Setting("smollm2-135m", None, None, threads=2, seed=0, backend="openvino")
    found = bench([f"adi:full:{p}" for p in PRECISIONS], items, setting, Extent(TOKENS, batch=PROMPTS))
    rows = [
        {
            "precision": entry["name"].rpartition(":")[2],
            "one_tokens_per_second": entry["alone_tokens_per_second"],
            **{name: entry[name] for name in ("batch_tokens_per_second", "median", "low", "high", "same")},
        }
        for entry in found["batches"]
        if entry["error"] is None
    ]
    about = {"command": f"python tools/batch.py {out}", "prompts": PROMPTS, "max_new_tokens": TOKENS, "pairs": PAIRS}
    out.write_text(json.dumps({"format": "adi-batch", **about, "ends": True, "precisions": rows}, indent=1) + "\n")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
