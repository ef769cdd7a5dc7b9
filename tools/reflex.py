"""Reflex mode measured for docs/reflex.md, in stages that go on where they were stopped; stages are functions of one folder.

``python tools/prompts.py > topics.jsonl``, then ``python tools/reflex.py topics.jsonl WORK docs/results/reflex.json``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import adi
from adi.exits.triggers import Threshold, trigger_from_json
from adi.files import read_json, write_json
from adi.measure.path import path
from adi.measure.risk import Sample, own_text
from adi.measure.told import Told, tell
from adi.prompts import read_prompts

LEVELS = (0.005, 0.01, 0.02, 0.05, 0.1)
TOKENS, LEARNING, CALIBRATION, CHUNK = 32, 160, 800, 80
Guard = Callable[[], AbstractContextManager[object]]


def chosen(topics: Path) -> tuple[list[str], list[str]]:
    """Prompts for the path and for calibration: two random samples of the same set, without overlap."""
    prompts = [item.prompt for item in read_prompts(topics)]
    random.Random(1).shuffle(prompts)
    return prompts[:LEARNING], prompts[LEARNING : LEARNING + CALIBRATION]


def telling(model: adi.Model, exits: adi.Exits, prompts: Sequence[str], file: Path, guard: Guard) -> list[Told]:
    """Full depth's answers, read at every depth; kept in a file."""
    found: list[Told] = []
    if file.exists():
        with torch.serialization.safe_globals([Told]):
            found = torch.load(file)
    while len(found) < len(prompts):
        with guard():
            part = adi.generate_batch(model, prompts[len(found) : len(found) + CHUNK], max_new_tokens=TOKENS)
            found += tell(model.backbone, exits, [(g.prompt_ids, g.token_ids) for g in part])
        torch.save(found, file)
        print(file.name, len(found), flush=True)
    return found


def sampling(
    model: adi.Model, exits: adi.Exits, told: Sequence[Told], trigger: Threshold, file: Path, guard: Guard
) -> list[Sample]:
    """Reflex decoding's own texts under one rule, judged; kept in a file."""
    found = [Sample(**row) for row in read_json(file, "samples")] if file.exists() else []
    while len(found) < len(told):
        with guard():
            found += own_text(model, exits, told[len(found) : len(found) + CHUNK], trigger, TOKENS)
        write_json(file, [asdict(sample) for sample in found])
        print(file.name, len(found), flush=True)
    return found


def collect(topics: Path, work: Path, count: int = CALIBRATION, guard: Guard = nullcontext) -> None:
    """The path of rules, and every calibration prompt's samples under each."""
    model, exits = adi.load("smollm2-135m"), adi.load_exits("smollm2-135m")
    layers = model.backbone.spec.layers
    learning, calibration = chosen(topics)
    calibration = calibration[:count]
    learned = telling(model, exits, learning, work / "learning.pt", guard)
    if not (work / "path.json").exists():
        rules = path(learned, exits.depths, layers, LEVELS, "disagreement")
        write_json(work / "path.json", [{**asdict(r), "trigger": r.trigger.to_json()} for r in rules])
    told = telling(model, exits, calibration, work / "calibration.pt", guard)
    rules_: list[Any] = read_json(work / "path.json", "path")
    for place, rule in enumerate(rules_):
        trigger = trigger_from_json(rule["trigger"])
        assert isinstance(trigger, Threshold)
        sampling(model, exits, told, trigger, work / f"samples-{place}.json", guard)
    print(json.dumps({"rules": len(rules_)}))
