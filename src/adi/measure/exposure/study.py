"""The exposure study: parts trained and observed one by one, each a file that is whole or absent."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch

from adi.files import whole_file, write_json
from adi.measure.exposure.devalue import devalue
from adi.measure.exposure.facts import MOST_HOPS, Facts, Item, batch_of
from adi.measure.exposure.knowledge import Variable, knowledge, turn_states
from adi.measure.exposure.network import TURNS, network
from adi.measure.exposure.observe import Probes, columns, item_probes, observe, place_of, repeat_probes
from adi.measure.exposure.settings import SETTINGS, ExposureSettings, Part
from adi.measure.exposure.train import BATCH, SCHOOL_BATCH, Life
from adi.model.looped import LoopedForCausalLM
from adi.progress import Progress
from adi.schema import claim, read_json_as

CONTEXTS, EARLY_CONTEXTS, REPEATS, KNOWLEDGE = 6, 2, 100, 1600  # contexts of an item; texts
PARTS = "parts"


class Kept(TypedDict):
    """What a part's file holds."""

    texts: int
    emergence: list[dict[str, Any]]
    items: dict[str, list[Any]]
    repeats: dict[str, list[Any]]
    devaluation: dict[str, Any]
    knowledge: dict[str, Any]
    gate_only: NotRequired[dict[str, list[Any]]]


def run_study(settings: ExposureSettings, folder: Path, progress: Progress) -> list[tuple[Part, dict[str, Any]]]:
    """Train and observe the parts that are not there yet; all parts with what is kept of them. UsageError where the folder
    was begun with other settings."""
    claim(folder / SETTINGS, settings)
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    parts, found = list(settings.parts()), []
    for n, part in enumerate(parts):
        path = folder / PARTS / f"{part.name}.json"
        if not path.exists():
            told = partial(_tell, progress, n, len(parts), settings.steps, part.name)
            life = Life(part, settings)
            kept = run_part(life, folder, settings.prices, told)
            with whole_file(path.with_suffix(".pt")) as fresh:
                torch.save(life.model.state_dict(), fresh)
            write_json(path, kept)
        progress((n + 1) * settings.steps, len(parts) * settings.steps, part.name)
        found.append((part, dict(read_json_as(path, Kept, "part of the study"))))
    return found


def _tell(progress: Progress, part: int, parts: int, steps: int, name: str, step: int) -> None:
    progress(part * steps + max(0, step - 1), parts * steps, name)


def run_part(life: Life, folder: Path, prices: Sequence[float], progress: Any) -> dict[str, Any]:
    """Train one model; what was observed on the way, at the end, with gates trained alone and after devaluation."""
    facts, seed = life.facts, life.part.seed
    early, probes = _probes(facts, EARLY_CONTEXTS), _probes(facts, CONTEXTS)
    emergence = life.live(folder, lambda model, step: {"step": step, **columns(observe(model, early))}, progress)
    kept = {
        "texts": SCHOOL_BATCH * life.school_steps + BATCH * life.steps,
        "emergence": emergence,
        "items": columns(observe(life.model, probes)),
        "repeats": columns(observe(life.model, repeat_probes(facts, REPEATS, seed))),
        "devaluation": devalue(life.model, facts, life.part.price, seed),
        "knowledge": hops_knowledge(life.model, network(life.part.shape, seed + 1), facts, min(KNOWLEDGE, 4 * life.steps)),
    }
    if life.part.price == 0:
        twins = {price: life.gate_only(price) for price in prices if price}
        kept["gate_only"] = {f"{price:g}": columns(observe(twin, probes))["halted"] for price, twin in twins.items()}
    return kept


def hops_knowledge(model: LoopedForCausalLM, untrained: LoopedForCausalLM, facts: Facts, count: int) -> dict[str, Any]:
    """Of fresh questions of four hops, at the place of each hop: from which turn on is the name known to which it leads?"""
    texts, answers_NK, places = [], [], []
    for n in range(count):
        dice = random.Random(f"{facts.seed} knowledge {n}")
        item = Item(facts.fresh(dice, MOST_HOPS), 0, 0)
        texts.append(facts.text(dice, [item], repeated=0.0))
        answers_NK.append(facts.answers(item.key))
        places.append(place_of(texts[-1], item.key))
    ids_BT = batch_of(texts).ids_BT
    place_NK = np.array(places)[:, None] + np.arange(1 - MOST_HOPS, 1)
    row_N = np.arange(count)
    known, random_net = (
        turn_states(net, ids_BT)[:, row_N[:, None], place_NK].reshape(TURNS, count * MOST_HOPS, -1)
        for net in (model, untrained)
    )
    variables = [Variable(k + 1, np.array(answers_NK)[:, k], row_N * MOST_HOPS + k) for k in range(MOST_HOPS)]
    flat = TURNS, count * MOST_HOPS, -1
    return knowledge(known.reshape(flat), random_net.reshape(flat), np.repeat(row_N, MOST_HOPS), variables)


def _probes(facts: Facts, contexts: int) -> Probes:
    return item_probes(facts, range(len(facts.items)), contexts, facts.seed)
