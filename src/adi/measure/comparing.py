"""Looped models side by side on the same test items: training objectives, networks of a fixed depth, prices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adi.decoding.looped.solve import halting_rule, task_of
from adi.errors import ModelError
from adi.files import read_json
from adi.measure.halting_controls import areas, by_item, interval, middle, resamples
from adi.measure.solving import asked, readings, right, run_items
from adi.model.load import load_looped
from adi.model.looped import LoopedForCausalLM


def compared(sources: Sequence[Any], count: int, seed: int, price: float | None = None) -> list[dict[str, Any]]:
    """A row for each looped model, on the same ``count`` test items.

    ``accuracy`` is that of all its ``turns``: what a network trained with one loss after so many turns (objective "last") is
    for. The others halt by their gate: ``accuracy_halted`` in ``mean_turns`` at their own thresholds, and over all thresholds
    ``area``, the mean accuracy over all budgets from one turn to the first model's all; ``ahead`` is the first's area less
    this one's. Intervals are of 95%, bootstrapped over items, the same items for all models. ``price`` is for gates that take
    one. ModelError for models of different tasks.
    """
    models = [load_looped(source) for source in sources]
    tasks = [task_of(model) for model in models]
    if others := {task.name for task in tasks} - {tasks[0].name}:
        raise ModelError(
            f"models of {tasks[0].name} and of {', '.join(sorted(others))} solve different items: give one task's."
        )
    drawn = tasks[0].batch(count, (seed,), test=True)
    ids_BT = torch.tensor(drawn.ids_BT)
    chosen_SB = resamples(count)
    rows: list[dict[str, Any]] = []
    first_S: np.ndarray | None = None
    for source, model in zip(sources, models, strict=True):
        its = price if model.config.gate_price else None
        objective = _objective(model)
        full = run_items(model, tasks[0], ids_BT, halting_rule(model, False))
        row = {"model": str(source), "objective": objective, "turns": model.config.turns}
        row |= _share("accuracy", right(tasks[0], drawn, full))
        if objective != "last":
            halted = run_items(model, tasks[0], ids_BT, halting_rule(model, price=its))
            row |= _share("accuracy_halted", right(tasks[0], drawn, halted))
            row |= _share("mean_turns", asked(tasks[0], drawn, halted.turns_BT.numpy()))
            right_RN, found = readings(model, tasks[0], drawn, its)
            whole, area_S = areas(right_RN, found["gate"], models[0].config.turns, chosen_SB)
            row |= {"area": whole, "area_interval": middle(area_S)}
            first_S = area_S if first_S is None else first_S
            row |= {"ahead_interval": middle(first_S - area_S)}
        rows.append(row)
    return rows


def at_prices(source: Any, prices: Sequence[float], count: int, seed: int, **halting: Any) -> list[dict[str, Any]]:
    """What a gate that takes the price does at each: accuracy and mean turns on the same test items, with 95% intervals."""
    model = load_looped(source)
    task = task_of(model)
    drawn = task.batch(count, (seed,), test=True)
    ids_BT, rows = torch.tensor(drawn.ids_BT), []
    for price in sorted(prices):
        found = run_items(model, task, ids_BT, halting_rule(model, **{**halting, "price": price}))
        rows.append(
            {
                "price": price,
                **_share("accuracy", right(task, drawn, found)),
                **_share("mean_turns", asked(task, drawn, found.turns_BT.numpy())),
            }
        )
    return rows


def _share(name: str, values: np.ndarray) -> dict[str, Any]:
    return {name: float(values.mean()), f"{name}_interval": interval(by_item(values))}


def _objective(model: LoopedForCausalLM) -> str | None:
    """What a model of ``adi train`` was trained by; None for another."""
    path = Path(model.config._name_or_path) / "train.json"
    return str(read_json(path, "training settings").get("objective", "price")) if path.is_file() else None
