"""Reflex mode measured for docs/reflex.md, in stages that go on where they were stopped; stages are functions of one folder.

``python tools/prompts.py > topics.jsonl``, then ``python tools/reflex.py topics.jsonl WORK docs/results/reflex.json``.
With names of stages after these (``speed``, ``tasks``, ``drift``) only those are measured, once more.
``tools/propagation.py`` measures propagated keys and values by itself.
"""

from __future__ import annotations

import functools
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from reflex_use import drift, speeds, tasks

import adi
from adi.exits.calibration import PVALUES, PValue, betting, binomial_interval, conformal, learn_then_test
from adi.exits.triggers import Threshold, trigger_from_json
from adi.files import read_json, write_json
from adi.measure.calibrate import Tested, certify, losses, text_hash
from adi.measure.circumstances import circumstances
from adi.measure.path import LOOK_BLOCKS, path
from adi.measure.risk import NATS, Sample, own_text, replay, replayed
from adi.measure.told import Told, tell
from adi.prompts import read_prompts

LEVELS = (0.005, 0.01, 0.02, 0.05, 0.1)
NAT_LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2)  # nats per token
DELTA, SPLITS = 0.05, 200
STAGES = ("speed", "tasks", "drift")
SCALES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SHARES = (0.999, 0.99, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4)
TOKENS, LEARNING, LOOKED_AT, CALIBRATION, CHUNK = 32, 160, 560, 600, 40
Guard = Callable[[], AbstractContextManager[object]]


def chosen(topics: Path) -> tuple[list[str], list[str]]:
    """Prompts for the path and for calibration: two random samples of one set, without overlap. The first
    ``LOOKED_AT`` went into an earlier calibration whose size was set after a look at samples; none is calibrated on again."""
    prompts = [item.prompt for item in read_prompts(topics)]
    random.Random(1).shuffle(prompts)
    return prompts[:LEARNING], prompts[LOOKED_AT : LOOKED_AT + CALIBRATION]


def telling(model: adi.Model, exits: adi.Exits, prompts: Sequence[str], file: Path, guard: Guard) -> list[Told]:
    """Full depth's answers, read at every depth; kept in a file."""
    found: list[Told] = []
    if file.exists():
        with torch.serialization.safe_globals([Told]):
            found = torch.load(file, weights_only=True)
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


def collect(topics: Path, work: Path, guard: Guard = nullcontext) -> None:
    """The path of rules, and every calibration prompt's samples under each."""
    model, exits = adi.load("smollm2-135m"), adi.load_exits("smollm2-135m")
    layers = model.backbone.spec.layers
    learning, calibration = chosen(topics)
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


def splits(tested: Sequence[Tested], kind: str, level: float, method: str, p_value: PValue) -> dict[str, Any]:
    """Calibrate on a random half of the sequences, look at the other half, again and again."""
    table = losses(tested, kind)
    depth_GN = np.array([[sample.depth for sample in rule.samples] for rule in tested])
    unit = level if kind == "disagreement" else level / NATS
    count, risks, truths, depths, never = table.shape[1], [], [], [], 0
    for seed in range(SPLITS):
        order = list(range(count))
        random.Random(seed).shuffle(order)
        fit, held = order[: count // 2], order[count // 2 :]
        place = learn_then_test(table[:, fit], unit, DELTA, p_value) if method == "ltt" else conformal(table[:, fit], unit)
        never += place is None
        risks.append(0.0 if place is None else float(table[place, held].mean()))
        truths.append(0.0 if place is None else float(table[place].mean()))
        depths.append(30.0 if place is None else float(depth_GN[place, held].mean()))
    above = sum(risk > unit for risk in risks)
    return {
        "kind": kind,
        "level": level,
        "method": method,
        "splits": SPLITS,
        "calibration": count // 2,
        "test": count - count // 2,
        "above": above,
        "interval": binomial_interval(above, SPLITS),
        "above_all": sum(risk > unit for risk in truths),
        "mean_test_risk": float(np.mean(risks)) * (1 if kind == "disagreement" else NATS),
        "mean_depth": float(np.mean(depths)),
        "never": never,
    }


def perplexity(told: Sequence[Told]) -> float:
    """Of full depth's own answers under the full model."""
    return math.exp(-sum(float(t.log_T.sum()) for t in told) / sum(len(t.said_T) for t in told))


def looks(told: Sequence[Told], depths: Sequence[int], layers: int, trigger: Threshold) -> float:
    """Exits looked at for a token, replayed; none for an answer's first."""
    asked = torch.tensor([d for d in depths if trigger.may_fire(d)])
    seen = [replay(t, depths, layers, trigger).depth_T[1:] for t in told]
    return sum(int((depth_T[:, None] >= asked).sum()) for depth_T in seen) / sum(len(t.said_T) for t in told)


def references(told: Sequence[Told], depths: Sequence[int], layers: int) -> dict[str, list[dict[str, float]]]:
    """Risk and mean depth without calibration, replayed: the exits' own rule at other thresholds, one depth always, and the
    shallowest depth that is right (nobody knows it)."""

    def point(trigger: Threshold) -> dict[str, float]:
        samples = [replayed(t, depths, layers, trigger) for t in told]
        risk, depth = (mean(getattr(s, key) for s in samples) for key in ("disagreement", "depth"))
        return {"risk": risk, "depth": depth, "cost": depth + LOOK_BLOCKS * looks(told, depths, layers, trigger)}

    shipped = {8: 1.6984, 20: 1.8515, 24: 2.5837, 28: 2.6026}
    entropy = [point(Threshold("entropy", {d: t * scale for d, t in shipped.items()})) for scale in SCALES]
    single = [point(Threshold("top_probability", share)) for share in SHARES]
    fixed = [point(Threshold("top_probability", {d: 0.0})) for d in depths]
    right = [torch.cat([t.token_ET == t.full_T, torch.ones(1, len(t.full_T), dtype=torch.bool)]) for t in told]
    ends = torch.tensor([*depths, layers])
    oracle = mean(float(ends[r.double().argmax(0)].double().mean()) for r in right)
    return {
        "shipped entropy rule": entropy,
        "one top probability": single,
        "fixed depth": fixed,
        "oracle": [{"risk": 0.0, "depth": oracle, "cost": oracle}],
    }


def certified(work: Path, out: Path) -> adi.Exits:
    """The shipped exits with certificates from all collected samples, saved to a folder."""
    exits = adi.load_exits("smollm2-135m")
    made = []
    for kind, levels in (("disagreement", LEVELS), ("log_loss", NAT_LEVELS)):
        for level in levels:
            tested, told = gathered(work)
            about = {
                "method": "ltt",
                "kind": kind,
                "delta": DELTA,
                "max_new_tokens": TOKENS,
                "text_hash": text_hash([t.prompt_ids for t in told]),
                "fingerprint": exits.base,
                "precision": "int8",
            }
            made.append(certify(tested, level, len(told), exits.layers, about))
    exits = replace(exits, certificates=tuple(made))
    exits.save(out)
    return exits


@functools.cache
def gathered(work: Path) -> tuple[list[Tested], list[Told]]:
    """The rules of the path with every calibration prompt's samples."""
    with torch.serialization.safe_globals([Told]):
        told = torch.load(work / "calibration.pt", weights_only=True)
    rules: list[Any] = read_json(work / "path.json", "path")
    depths, layers = adi.load_exits("smollm2-135m").depths, 30
    tested = []
    for place, rule in enumerate(rules):
        samples = [Sample(**row) for row in read_json(work / f"samples-{place}.json", "samples")]
        assert len(samples) == len(told) == CALIBRATION, "collecting was not finished"
        trigger = trigger_from_json(rule["trigger"])
        again = tuple(replayed(t, depths, layers, trigger) for t in told)
        tested.append(Tested(trigger, tuple(samples), again))
    return tested, told


def report(topics: Path, work: Path, out: Path) -> dict[str, Any]:
    """Everything that follows from the samples alone."""
    tested, told = gathered(work)
    exits = adi.load_exits("smollm2-135m")
    rules = []
    for rule in tested:
        row: dict[str, Any] = {"trigger": rule.trigger.to_json(), "sequences": len(rule.samples)}
        for way, samples in (("own", rule.samples), ("replayed", rule.replayed)):
            tokens = sum(s.tokens for s in samples)
            row[way] = {
                "disagreement": mean(s.disagreement for s in samples),
                "nats": NATS * mean(s.log_loss for s in samples),
                "depth": mean(s.depth for s in samples),
                "full_share": sum(s.full for s in samples) / tokens,
                "perplexity": math.exp(-sum(s.log_probability for s in samples) / tokens),
            }
        assert isinstance(rule.trigger, Threshold)
        asked = looks(told, exits.depths, exits.layers, rule.trigger)
        row["full_perplexity"] = perplexity(told)
        for way in ("own", "replayed"):
            row[way]["cost"] = row[way]["depth"] + LOOK_BLOCKS * asked
        rules.append(row)
    kinds = [("disagreement", level) for level in LEVELS] + [("log_loss", level) for level in NAT_LEVELS]
    ways = (("ltt", "betting"), ("ltt", "hoeffding-bentkus"), ("crc", ""))
    value = {
        "format": "adi-reflex",
        "version": 1,
        **circumstances(f"python tools/reflex.py {topics.name} WORK {out}", read_prompts(topics)),
        "sequences": len(told),
        "learning": LEARNING,
        "tokens": TOKENS,
        "delta": DELTA,
        "certificates": [c.to_json() for c in certified(work, work / "exits").certificates],
        "rules": rules,
        "full_perplexity": perplexity(told),
        "splits": [
            {
                **splits(tested, kind, level, method, PVALUES.get(name, betting)),
                "bound": name,
            }
            for kind, level in kinds
            for method, name in ways
        ],
        "references": references(told, exits.depths, exits.layers),
    }
    used = work / "use.json"
    write_json(out, {**value, **(read_json(used, "use") if used.exists() else {})})
    return value


def use(topics: Path, work: Path, stage: str, guard: Guard = nullcontext) -> None:
    """What needs the model once more: ``speed``, ``tasks`` or ``drift``, kept in a file."""
    model, exits = adi.load("smollm2-135m"), adi.load_exits(work / "exits")
    levels = list(LEVELS)
    prompts = [item.prompt for item in read_prompts(topics)]
    random.Random(2).shuffle(prompts)
    file = work / "use.json"
    made: Any = {
        "speed": lambda: speeds(model, exits, levels, prompts[:24], 48),
        "tasks": lambda: tasks(model, exits, levels),
        "drift": lambda: drift(model, exits, prompts, guard),
    }[stage]()
    write_json(file, {**(read_json(file, "use") if file.exists() else {}), stage: made})


if __name__ == "__main__":
    prompts_, work_, out_ = (Path(argument) for argument in sys.argv[1:4])
    work_.mkdir(parents=True, exist_ok=True)
    if not sys.argv[4:]:
        collect(prompts_, work_)
    certified(work_, work_ / "exits")
    for step in sys.argv[4:] or STAGES:
        use(prompts_, work_, step)
    report(prompts_, work_, out_)
