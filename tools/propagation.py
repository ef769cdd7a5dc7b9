"""What propagated keys and values change: ``python tools/propagation.py topics.jsonl docs/results/propagation.json``.

The rules of the certificates that the default model's exits carry, each with exact and with propagated keys and values of
skipped layers, on transformers' modules in float32; a full pass over the text that came out is the judge. Prompts come from
``tools/prompts.py``. A rule that is done is kept: a stopped run goes on behind it.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import adi
from adi.exits.triggers import Threshold
from adi.files import read_json, write_json
from adi.measure.circumstances import circumstances
from adi.measure.risk import NATS, Sample, own_text
from adi.measure.told import tell
from adi.prompts import read_prompts

PROMPTS, TOKENS, SEED = 40, 32, 3


def main(topics: Path, out: Path) -> None:
    items = read_prompts(topics)
    prompts = random.Random(SEED).sample([item.prompt for item in items], PROMPTS)
    model, exits = adi.load("smollm2-135m", backend="hf"), adi.load_exits("smollm2-135m")
    certificates = [c for c in exits.certificates if c.kind == "disagreement" and isinstance(c.trigger, Threshold)]
    rules = {c.level: c.trigger for c in sorted(certificates, key=lambda c: c.level)}
    about = circumstances(f"python tools/propagation.py {topics.name} {out}", items)
    about |= {"engine": "hf", "precision": "fp32", "sequences": PROMPTS, "tokens": TOKENS, "seed": SEED}
    wanted = [trigger.to_json() for trigger in rules.values()]
    kept: list[Any] = read_json(out, "measurement")["rules"] if out.exists() else []
    rows = [row for row in kept if row["trigger"] in wanted]
    full = [adi.generate(model, prompt, max_new_tokens=TOKENS) for prompt in prompts]
    told = tell(model.backbone, exits, [(g.prompt_ids, g.token_ids) for g in full])
    for level, trigger in rules.items():
        if any(row["trigger"] == trigger.to_json() for row in rows):
            continue
        ways = {way: _summary(own_text(model, exits, told, trigger, TOKENS, way)) for way in ("exact", "propagate")}
        rows.append({"level": level, "trigger": trigger.to_json(), **ways})
        rows.sort(key=lambda row: row["level"])
        write_json(out, {"format": "adi-propagation", **about, "rules": rows})
        print(level, ways, flush=True)


def _summary(samples: list[Sample]) -> dict[str, float]:
    return {
        "disagreement": mean(s.disagreement for s in samples),
        "nats": NATS * mean(s.log_loss for s in samples),
        "depth": mean(s.depth for s in samples),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
