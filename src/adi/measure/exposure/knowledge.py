"""What each depth knows of a hidden state: linear probes by turn, less what shuffled labels and an untrained network give.

Whether a network works serially or by doubling shows in how far back a turn reaches: one step more with each turn, or twice as
many (Alain and Bengio 2016 on linear probes; Merrill and Sabharwal 2023 on depth).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adi.decoding.looped.solve import task_of
from adi.errors import UsageError
from adi.measure.halting_controls import interval
from adi.model.load import load_looped
from adi.model.looped import LoopedForCausalLM
from adi.tasks.registry import Products

RIDGE, HALF = 1e-3, 0.5
WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Variable:
    """A hidden state that is known: ``labels_M`` at places ``place_M`` of the N whose states are probed; ``steps`` back."""

    steps: int
    labels_M: np.ndarray
    place_M: np.ndarray


def probe(states_MD: np.ndarray, labels_M: np.ndarray, text_M: np.ndarray) -> np.ndarray:
    """Ridge regression on one-hot labels, fitted on the texts of even number: of those of odd number, which are right."""
    kinds, label_M = np.unique(labels_M, return_inverse=True)
    fit_M = text_M % 2 == 0
    mean_D, spread_D = states_MD[fit_M].mean(0), states_MD[fit_M].std(0) + 1e-6
    x_MD = np.column_stack([(states_MD - mean_D) / spread_D, np.ones(len(states_MD))])
    x, y = x_MD[fit_M], np.eye(len(kinds))[label_M[fit_M]]
    weights_DK = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
    return np.asarray((x_MD[~fit_M] @ weights_DK).argmax(1) == label_M[~fit_M])


def knowledge(
    trained_RND: np.ndarray, untrained_RND: np.ndarray, text_N: np.ndarray, variables: Sequence[Variable]
) -> dict[str, Any]:
    """For each variable and turn the accuracy of a probe with its interval, and that of the controls; how far each turn
    reaches, and whether reach grows by a step or twofold a turn."""
    dice, rows = np.random.default_rng(0), []
    for variable in variables:
        text_M, place_M = text_N[variable.place_M], variable.place_M
        dealt_M = dice.permutation(variable.labels_M)
        for turn in range(len(trained_RND)):
            right = probe(trained_RND[turn, place_M], variable.labels_M, text_M)
            row: dict[str, Any] = {"steps": variable.steps, "turn": turn + 1, "places": len(place_M)}
            row |= {"accuracy": float(right.mean()), "interval": interval(right)}
            row["shuffled"] = float(probe(trained_RND[turn, place_M], dealt_M, text_M).mean())
            row["untrained"] = float(probe(untrained_RND[turn, place_M], variable.labels_M, text_M).mean())
            rows.append(row)
    return {"rows": rows, **growth(reach(rows))}


def reach(rows: Sequence[dict[str, Any]]) -> list[int]:
    """How many steps back each turn knows: as long as the probe closes half of the gap from shuffled labels to all right."""
    found = []
    for turn in sorted({row["turn"] for row in rows}):
        far = 0
        for row in sorted((row for row in rows if row["turn"] == turn), key=lambda row: int(row["steps"])):
            if row["accuracy"] < row["shuffled"] + HALF * (1 - row["shuffled"]):
                break
            far = row["steps"]
        found.append(far)
    return found


def growth(reached: Sequence[int]) -> dict[str, Any]:
    """Serial (reach rises by a constant) or doubling (by a factor), by least squares on the turns in which it rises."""
    rising = [far for far, before in zip(reached, (0, *reached[:-1]), strict=True) if far > before]
    found: dict[str, Any] = {"reach": list(reached), "steps_a_turn": None, "factor_a_turn": None, "verdict": None}
    if len(rising) < 3:
        return found
    turn = np.arange(len(rising))
    lines = {name: np.polyfit(turn, values, 1) for name, values in (("steps", rising), ("logs", np.log2(rising)))}
    miss = {
        "serial": np.abs(np.log2(np.maximum(np.polyval(lines["steps"], turn), 0.1)) - np.log2(rising)).sum(),
        "doubling": np.abs(np.polyval(lines["logs"], turn) - np.log2(rising)).sum(),
    }
    rates = {"steps_a_turn": float(lines["steps"][0]), "factor_a_turn": float(2 ** lines["logs"][0])}
    return found | rates | {"verdict": min(miss, key=lambda name: miss[name])}


@torch.no_grad()
def turn_states(model: LoopedForCausalLM, ids_BT: np.ndarray) -> np.ndarray:
    """The states that are read after each turn, ``[R, B, T, D]``."""
    return np.asarray(torch.stack(model.model(input_ids=torch.tensor(ids_BT))[0]).numpy())


def untrained(model: LoopedForCausalLM, seed: int = 0) -> LoopedForCausalLM:
    """A network of the same form with fresh weights."""
    torch.manual_seed(seed)
    fresh = LoopedForCausalLM(model.config)
    fresh.eval()
    return fresh


def products_knowledge(source: Any = "products", count: int = 1024, seed: int = 7) -> dict[str, Any]:
    """Of a model of products: from which turn on is the product of the last k elements known, where the last RESET is k ago
    (the answer), and where it is further back (a step on the way)? UsageError for a model of another task."""
    model = load_looped(source)
    task = task_of(model)
    if not isinstance(task, Products):
        raise UsageError(f"{source} was trained on {task.name}: give a model of products.")
    group = task.group
    drawn = group.batch(count, 32, (seed, 1))
    shape = len(turn_states(model, drawn.ids_BT[:1])), -1, model.config.hidden_size
    known_RND, random_RND = (turn_states(net, drawn.ids_BT).reshape(shape) for net in (model, untrained(model)))
    text_N = np.repeat(np.arange(count), 32)
    found: dict[str, Any] = {"model": str(source), "texts": count}
    for name, wanted in (("answer", np.equal), ("on_the_way", np.greater)):
        variables = []
        for window in WINDOWS:
            place_M = np.flatnonzero(wanted(drawn.difficulty_BT.ravel(), window))
            labels_N = last_products(drawn.ids_BT, group.product, group.reset, window).ravel()
            variables.append(Variable(window, labels_N[place_M], place_M))
        found[name] = knowledge(known_RND, random_RND, text_N, variables)
    return found


def last_products(ids_BT: np.ndarray, product: np.ndarray, reset: int, window: int) -> np.ndarray:
    """The product of the last ``window`` elements at each place; what RESETs or the beginning cut off counts as identity."""
    now = np.zeros_like(ids_BT)
    for back in range(window - 1, -1, -1):
        ids = np.zeros_like(ids_BT)
        ids[:, back:] = ids_BT[:, : ids_BT.shape[1] - back]
        now = np.where(ids == reset, 0, product[now, np.minimum(ids, len(product) - 1)])
    return now
