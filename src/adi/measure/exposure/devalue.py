"""Outcome devaluation: facts change, and each depth is asked how long it goes on with the old answer.

The textbook test of a habit: what is done for its outcome stops when the outcome changes, what is a habit goes on. Here A -> B
becomes A -> C by examples of that fact alone. What leads over it, "ann teacher neighbour", is not trained: a depth that works
answers out follows at once, one that remembers them does not.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np

from adi.measure.exposure.facts import NAMES, Facts, Item, batch_of
from adi.measure.exposure.observe import Observed, Probes, Question, observe, place_of
from adi.measure.exposure.train import adamw, learn
from adi.measure.halting_controls import first_turns
from adi.measure.solving import THRESHOLDS
from adi.model.looped import LoopedForCausalLM
from adi.risk.bounds import learn_then_test
from adi.risk.drift import DriftMonitor
from adi.training.price import Price

EXAMPLES = (0, 1, 2, 4, 8, 16, 32)
NEW, CHANGED = 1, 15  # exposures at most; items of each kind whose last fact changes
RATE, CONTEXTS, RISK, DELTA = 1e-3, 2, 0.05, 0.05


def changed(facts: Facts, seed: int) -> tuple[Facts, dict[str, list[Item]]]:
    """The world in which the last facts of some items lead elsewhere; its questions: the facts themselves ("fact"), items
    that lead over them and were met often ("familiar") or hardly ever ("new"). An item's answer is the old one."""
    dice = random.Random(f"{seed} changed")
    several = [item for item in facts.items if item.hops > 1 and not item.masked]
    groups = {
        "familiar": [item for item in several if item.exposures >= facts.most // 4],
        "new": [item for item in several if item.exposures <= NEW],
    }
    groups = {name: dice.sample(items, min(CHANGED, len(items))) for name, items in groups.items()}
    moved = {facts.facts(item.key)[-1]: item.answer for items in groups.values() for item in items}
    now = {fact: dice.choice([n for n in range(1, NAMES + 1) if n != old]) for fact, old in moved.items()}
    groups["fact"] = [Item(fact, old, 0) for fact, old in moved.items()]
    new_world = replace(facts, changed=tuple(now.items()))
    kept = {name: [i for i in items if _leads_only_over_the_last(facts, i, now)] for name, items in groups.items()}
    return new_world, kept


def _leads_only_over_the_last(facts: Facts, item: Item, now: Iterable[Any]) -> bool:
    return not any(fact in now for fact in facts.facts(item.key)[:-1])


def devalue(
    model: LoopedForCausalLM, facts: Facts, price: float, seed: int, examples: tuple[int, ...] = EXAMPLES
) -> dict[str, Any]:
    """Shares of old (B) and new (C) answers by turn over the number of examples of each changed fact, for each group; what the
    gate's answers slip from full depth's, and when the drift monitor notices."""
    world, groups = changed(facts, seed)
    learner = deepcopy(model)
    optimizer = adamw(learner, RATE)
    threshold = _certified(model, facts, seed)
    rows, done = list[dict[str, Any]](), 0
    for count in examples:
        for n in range(done, count):
            learner.train()
            learn(learner, optimizer, batch_of(_lessons(world, groups["fact"], seed, n)), Price(price))
        done = count
        for name, items in groups.items():
            seen = observe(learner, _exam(world, items, seed))
            rows.append({"examples": count, "group": name, **shares(seen, items), **slips(seen, items, threshold)})
    watched = {count: [loss for row in rows if row["examples"] == count for loss in row["losses"]] for count in examples}
    rows = [{name: value for name, value in row.items() if name != "losses"} for row in rows]
    return {"certified_threshold": threshold, "rows": rows, "delay": [delay(n, seen) for n, seen in watched.items() if seen]}


def _lessons(world: Facts, items: list[Item], seed: int, n: int) -> list[Any]:
    """Texts in which each changed fact comes once, two a text, beside fresh questions that it has no part in."""
    dice = random.Random(f"{seed} lesson {n}")
    dealt = dice.sample(items, len(items))
    return [world.text(dice, dealt[i : i + 2]) for i in range(0, len(dealt), 2)]


def _exam(world: Facts, items: list[Item], seed: int) -> Probes:
    """Each item in some texts of unchanged fresh questions; its answer is the new one."""
    made = Probes([], [])
    for n, item in enumerate(items):
        answer = world.answers(item.key)[-1]
        for context in range(CONTEXTS):
            text = world.text(random.Random(f"{seed} exam {item.key} {context}"), [item], repeated=0.0)
            place = place_of(text, item.key)
            made.questions.append(Question(len(made.texts), place, answer, item.hops, n))
            made.texts.append(text)
    return made


def shares(seen: Observed, items: list[Item]) -> dict[str, list[float]]:
    """Of the questions, the share that says the old and the new answer, by turn."""
    old_Q = np.array([items[q.item or 0].answer for q in seen.questions])
    new_Q = np.array([q.answer for q in seen.questions])
    return {"old": (seen.said_RQ == old_Q).mean(1).tolist(), "new": (seen.said_RQ == new_Q).mean(1).tolist()}


def slips(seen: Observed, items: list[Item], threshold: float | None) -> dict[str, Any]:
    """How often the gate's answer differs from full depth's, which verified text always is; how often it is the old one where
    full depth's is the new one; and the single losses that a monitor would see at the certified threshold."""
    old_Q = np.array([items[q.item or 0].answer for q in seen.questions])
    new_Q = np.array([q.answer for q in seen.questions])
    said_Q = _reflex(seen, 0.5)
    watched = [] if threshold is None else (_reflex(seen, threshold) != seen.said_RQ[-1]).astype(int).tolist()
    return {
        "slips": float((said_Q != seen.said_RQ[-1]).mean()),
        "outlived": float(((said_Q == old_Q) & (seen.said_RQ[-1] == new_Q)).mean()),
        "first_outlived": float(((seen.said_RQ[0] == old_Q) & (seen.said_RQ[-1] == new_Q)).mean()),
        "losses": watched,
    }


def _reflex(seen: Observed, threshold: float) -> np.ndarray:
    """The answers at the turn where the gate's chance passes a threshold."""
    turn_Q = first_turns(1 / (1 + np.exp(-seen.halt_RQ.astype(np.float64))), threshold)
    return np.asarray(np.take_along_axis(seen.said_RQ, turn_Q[None], 0)[0])


def _certified(model: LoopedForCausalLM, facts: Facts, seed: int, count: int = 200) -> float | None:
    """The gate's boldest threshold whose answers differ from full depth's in at most 5% of places, as certified before."""
    made = Probes([], [])
    for n in range(count):
        text = facts.text(random.Random(f"{seed} calibration {n}"))
        made.questions.extend(Question(n, place, text.labels[place], 1) for place in text.due)
        made.texts.append(text)
    seen = observe(model, made)
    of_text = np.array([q.text for q in seen.questions])
    losses = [
        np.bincount(of_text, _reflex(seen, threshold) != seen.said_RQ[-1]) / np.bincount(of_text) for threshold in THRESHOLDS
    ]
    chosen = learn_then_test(np.array(losses), RISK, DELTA)
    return None if chosen is None else THRESHOLDS[chosen]


def delay(examples: int, losses: list[int]) -> dict[str, Any]:
    """How many checked answers, in random order, until the drift monitor's alarm; None for none among those there are."""
    dealt = np.random.default_rng(0).permutation(losses)
    monitor = DriftMonitor(RISK, DELTA)
    alarm = next((n for n, loss in enumerate(dealt, 1) if monitor.saw(float(loss))), None)
    return {"examples": examples, "checked": len(losses), "risk": float(np.mean(losses)), "alarm_after": alarm}
