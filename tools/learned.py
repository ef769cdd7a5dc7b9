"""Train the default model's blocks on the built-in workloads, and measure it beside the model as it was (docs/habits.md):

    python tools/learned.py --out out/learned --minutes 180 --json docs/results/learned.json

A folder that is trained already is measured only. Both models answer prompts of the same kinds that nobody trained on: some for
certificates of reflex mode (Learn then Test), others for scores and times. ``--frozen`` are the exits of the model as it was
(of ``adi habituate``); their drafter serves both models.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from workloads import order, product, reply

import adi
from adi.files import write_json
from adi.measure.calibration.calibrate import calibrate
from adi.measure.provenance import provenance
from adi.measure.quality import windows_of
from adi.measure.statistics import clustered_median
from adi.progress import Reporter
from adi.prompts import read_prompts
from adi.training.generate_data import GenerateOptions, generate_dataset
from adi.training.shards import texts_in
from adi.training.train_model import CURVE, ModelOptions, general_text, train_model

MODEL, LEVELS, TOKENS = "smollm2-135m", (0.02, 0.05, 0.1), 64
SEED, ANSWER = 99, 96
KINDS = {"orders": order, "replies": reply, "products": product}


def fresh_prompts(count: int) -> list[tuple[str, str]]:
    """Category and text of prompts of the same kinds that are not built in, mixed."""
    known, dice = {item.prompt for item in read_prompts("workloads")}, random.Random(SEED)
    found: list[tuple[str, str]] = []
    for kind, draw in KINDS.items():
        mine: set[str] = set()
        while len(mine) < count // 3:
            mine |= {draw(dice)} - known
        found += [(kind, text) for text in sorted(mine)]
    random.Random(1).shuffle(found)
    return found


def train(out: Path, minutes: float, frozen: adi.Exits, report: Any) -> None:
    """From the model's own answers to the built-in workloads, a fifth of the prompts held out."""
    model, engine = adi.load(MODEL, backend="hf"), adi.load(MODEL, precision="int8")
    assert model.tokenizer is not None
    prompts = [engine.encode(item.prompt) for item in read_prompts("workloads")]
    options = GenerateOptions(tokens=90_000, max_new_tokens=160, own_prompts=0.0, held_share=0.2)
    answers, held = (texts_in(side) for side in generate_dataset([engine], prompts, out / "work", options, report))
    once = list({text.ids[: text.first + 1]: text for text in reversed(held)}.values())
    plain = windows_of(model.tokenizer, "\n\n".join(item.prompt for item in read_prompts("bench")), 6144)
    talk = general_text(engine, out / "work", progress=report)
    how = ModelOptions(minutes=minutes)
    train_model(model, answers, talk, out, how, held=once, windows=plain, keep=frozen, progress=report)


def score(prompt: str, text: str) -> float:
    """Of an order in JSON the share of five keys whose values stand in the order; 0 for what is no JSON."""
    try:
        found = json.loads(re.sub(r"^```(json)?|```$", "", text.strip(), flags=re.MULTILINE).strip())
    except ValueError:
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    given, items = prompt.partition("Order:")[2].lower(), found.get("items")
    right = [bool(str(found.get(key) or "-no-").lower() in given) for key in ("customer", "street", "city", "day")]
    lines = [
        f"{i.get('quantity')} {i.get('name')}".lower() if isinstance(i, dict) else "-no-"
        for i in (items if isinstance(items, list) and items else [{}])
    ]
    return mean([*right, all(line in given for line in lines)])


def measured(models: dict[str, tuple[adi.Model, adi.Exits]], certify: int, test: int, report: Any) -> dict[str, Any]:
    """Certificates of each model; scores, depths and times of all routes, which take turns on every prompt."""
    prompts, certified, routes = fresh_prompts(certify + test), {}, {}
    for name, (model, exits) in models.items():
        texts = [text for _, text in prompts[:certify]]
        found = calibrate(model, exits, texts, LEVELS, max_new_tokens=TOKENS, progress=report)
        layers = model.backbone.spec.layers
        certified[name] = [{**c.to_json(), "share": c.mean_depth / layers} for c in found.certificates]
        able = replace(exits, certificates=found.certificates)
        policies = {"full": adi.FullDepth(), "verified": adi.Verified(able)}
        policies |= {f"reflex {level:.0%}": adi.Reflex(able, risk=level) for level in LEVELS}
        routes |= {f"{name} {way}": (model, policy) for way, policy in policies.items()}
    names, rows = list(routes), []
    for number, (_, text) in enumerate(prompts[certify:]):
        turn = [names[(number + i) % len(names)] for i in range(len(names))]
        rows.append({name: adi.generate(routes[name][0], text, routes[name][1], max_new_tokens=ANSWER) for name in turn})
        report(number + 1, test, "measuring")
    found_routes = {}
    for name in names:
        speed = [len(row[name].token_ids) / row[name].counters.seconds for row in rows]
        base = [len(row[names[0]].token_ids) / row[names[0]].counters.seconds for row in rows]
        ratio = clustered_median([[a / b for a, b in zip(speed, base, strict=True)]])
        orders = [(t, row[name].text) for (kind, t), row in zip(prompts[certify:], rows, strict=True) if kind == "orders"]
        found_routes[name] = {
            "tokens_per_second": median(speed),
            "ratio": [ratio.median, ratio.low, ratio.high],
            "score": mean(score(*each) for each in orders),
            "same_answers": mean(row[name].token_ids == row[names[0]].token_ids for row in rows),
            "mean_depth": mean(step.depth for row in rows for step in row[name].steps),
        }
    return {"certified": certified, "routes": found_routes, "prompts_certified": certify, "prompts_tested": test}


def main() -> None:
    """Train where that is not done, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--minutes", type=float, default=180.0, help="of training")
    parser.add_argument("--frozen", default=MODEL, help="exits of the model as it was")
    parser.add_argument("--certify", type=int, default=300, help="prompts for certificates")
    parser.add_argument("--test", type=int, default=60, help="prompts for scores and times")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    frozen = adi.load_exits(given.frozen)
    with Reporter(Console(stderr=True)) as report:
        if not (given.out / "exits.json").exists():
            train(given.out, given.minutes, frozen, report)
        own = replace(adi.load_exits(given.out), drafter=frozen.drafter, answers=frozen.answers)
        original, trained = (adi.load(str(source), precision=given.precision) for source in (MODEL, given.out))
        found = measured({"original": (original, frozen), "trained": (trained, own)}, given.certify, given.test, report)
    about = provenance(shlex.join(["python", *sys.argv]), read_prompts("workloads"))
    curve = json.loads((given.out / CURVE).read_text())
    write_json(given.json, {"format": "adi-learned", "version": 1, "model": MODEL, **about, "curve": curve, **found})


if __name__ == "__main__":
    main()
