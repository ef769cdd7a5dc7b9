"""Where full depth in float32 and transformers' greedy part ways, and by how much the model prefers one token there.

``python tools/divergences.py BENCH.json.partial OUT.json``: reads the tokens of an unfinished benchmark (its side file).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import adi
from adi.model.backbone import Rows
from adi.prompts import read_prompts


def main(partial: Path, out: Path) -> None:
    runs = json.loads(partial.read_text())["contestants"]
    mine, theirs = (runs[name]["outcomes"] for name in ("adi:full:fp32", "hf:fp32"))
    model, items = adi.load(backend="hf"), read_prompts("bench")
    found = []
    for place in sorted(set(mine) & set(theirs), key=int):
        a, b = mine[place][0]["token_ids"], theirs[place][0]["token_ids"]
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is None:
            continue
        ids = (*model.encode(items[int(place)].prompt), *a[:at])
        (states,) = model.backbone.forward([Rows(model.backbone.new_cache(), 0, ids, None)], 0, model.backbone.spec.layers)
        top = torch.topk(model.backbone.logits(states.hidden_TD[-1:])[0], 2)
        margin = float(top.values[0] - top.values[1])
        found.append({"prompt": int(place), "token": at, "margin": margin, "tokens": [a[at], b[at]]})
    value = {"format": "adi-divergences", "prompts": len(set(mine) & set(theirs)), "divergences": found}
    out.write_text(json.dumps(value, indent=1) + "\n")
    print(
        f"{value['prompts']} prompts, {len(found)} diverge",
        *(f"prompt {d['prompt']} token {d['token']}: {d['margin']:.2e}" for d in found),
        sep="\n",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
