"""How a looped model fares on its task: accuracy with all turns and halted, turns, and whether they follow difficulty."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adi.decoding.looped.halting import Halted, Rule
from adi.decoding.looped.solve import ITEMS_AT_ONCE, halting_rule, run_rule, task_of
from adi.errors import UsageError
from adi.measure.halting_controls import areas, by_item, interval, middle, oracle, resamples, shuffled, signals
from adi.measure.statistics import clustered_median
from adi.model.load import load_looped
from adi.model.looped import LoopedForCausalLM
from adi.risk.bounds import learn_then_test, sequences_needed
from adi.tasks.pointers import NONE
from adi.tasks.products import Batch
from adi.tasks.registry import Problem, Puzzles

THRESHOLDS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)  # safest first
TIMED_ITEMS = 64  # at least


def solving_report(source: Any, count: int, seed: int, price: float | None = None, **halting: Any) -> dict[str, Any]:
    """Test items drawn from ``seed``, as ``adi solve --json`` prints it; ``halting`` are options of ``halting_rule``.

    ``accuracy`` is of places (products) or of whole items; ``by_turn`` that of each fixed number of turns of the same network;
    ``rank_correlation`` is Spearman's between turns and the logarithm of difficulty, partial given the place for products.
    ``controls`` has what random halting with the same turns and the oracle reach, and the area under accuracy over mean turns
    of the gate and of other signals, with how far the gate is ahead of each on the same items. Intervals are of 95%,
    bootstrapped over items.
    """
    model = load_looped(source)
    task = task_of(model)
    drawn = task.batch(count, (seed,), test=True)
    ids_BT = torch.tensor(drawn.ids_BT)
    rule = halting_rule(model, True, price, **halting)
    halted = run_items(model, task, ids_BT, rule)
    fixed = [run_items(model, task, ids_BT, Rule(None, n)) for n in range(1, rule.most + 1)]
    good, turns = right(task, drawn, halted), asked(task, drawn, halted.turns_BT.numpy())
    return {
        "task": task.name,
        "seed": seed,
        "items": count,
        "threshold": rule.threshold,
        "verified": rule.verified,
        "starts": rule.starts,
        "backend": rule.backend,
        "turns": rule.most,
        "accuracy_all_turns": accuracy(task, drawn, fixed[-1]),
        "accuracy_all_turns_interval": interval(by_item(right(task, drawn, fixed[-1]))),
        "accuracy_halted": accuracy(task, drawn, halted),
        "accuracy_halted_interval": interval(by_item(good)),
        "mean_turns": float(turns.mean()),
        "mean_turns_interval": interval(by_item(turns)),
        "rank_correlation": rank_correlation(task, drawn, halted),
        "by_turn": [accuracy(task, drawn, each) for each in fixed],
        "by_difficulty": by_difficulty(task, drawn, halted),
        **({"by_level": by_level(task, drawn, halted)} if isinstance(task, Puzzles) else {}),
        "controls": controls(model, task, drawn, halted, price),
    }


def certified(source: Any, level: float, count: int, seed: int, delta: float = 0.05, **halting: Any) -> dict[str, Any] | None:
    """The boldest threshold of the gate whose answers differ from those of all turns in at most ``level`` of an item's places
    (of a puzzle: of the puzzles), with probability 1 - ``delta`` over the draw of ``count`` items: Learn then Test
    (Angelopoulos et al. 2021), thresholds from safe to bold. None where not even the safest could be shown; UsageError where
    no number could."""
    if not 0 < level < 1:
        raise UsageError(f"the level is {level!r}; it is a share of answers, above 0 and below 1.")
    if count < (fewest := sequences_needed(level, delta)):
        raise UsageError(f"{count} items cannot certify {level:g}: at least {fewest} are needed, all without a difference.")
    model = load_looped(source)
    task = task_of(model)
    drawn = task.batch(count, (seed,), test=True)
    ids_BT = torch.tensor(drawn.ids_BT)
    full_BT = run_items(model, task, ids_BT, halting_rule(model, False)).logits_BTV.argmax(-1).numpy()
    losses, turns = [], []
    for threshold in THRESHOLDS:
        found = run_items(model, task, ids_BT, halting_rule(model, **{**halting, "threshold": threshold}))
        differ_BT = (found.logits_BTV.argmax(-1).numpy() != full_BT) & ~given_places(task, drawn)
        losses.append(differ_BT.any(-1).astype(float) if task.unit == "item" else by_item(asked(task, drawn, differ_BT)))
        turns.append(float(asked(task, drawn, found.turns_BT.numpy()).mean()))
    at = learn_then_test(np.array(losses), level, delta)
    if at is None:
        return None
    kept = {"level": level, "delta": delta, "items": count, "seed": seed}
    return {**kept, "threshold": THRESHOLDS[at], "observed": float(losses[at].mean()), "mean_turns": turns[at]}


def speed(source: Any, sizes: Sequence[int], seed: int, repeats: int = 15, **halting: Any) -> list[dict[str, Any]]:
    """How many times faster halting is than all turns, by batch size, in wall-clock time: medians of interleaved pairs after a
    warm-up, with 95% intervals; and milliseconds of a batch. Small batches are timed one after the other, ``TIMED_ITEMS`` items
    in all, since each stops elsewhere. Both backends are timed where the compiled one is asked for. Let nothing else run
    meanwhile."""
    model = load_looped(source)
    task = task_of(model)
    rows = []
    chosen = halting.get("backend", "hf")
    for size, backend in product(sizes, dict.fromkeys(("hf", chosen))):
        ids_BT = torch.tensor(task.batch(max(size, TIMED_ITEMS), (seed,), test=True).ids_BT)
        parts = [part for part in ids_BT.split(size) if len(part) == size]
        rules = halting_rule(model, **{**halting, "backend": backend}), halting_rule(model, False, backend=backend)
        seconds = [[_seconds(model, task, parts, rule) for rule in rules] for _ in range(repeats + 1)][1:]
        ratio = clustered_median([[full / halted] for halted, full in seconds])
        halted_ms, full_ms = (1000 * float(np.median(column)) / len(parts) for column in zip(*seconds, strict=True))
        row = {"batch": size, "backend": backend, "median": ratio.median, "low": ratio.low, "high": ratio.high}
        rows.append({**row, "halted_ms": halted_ms, "all_turns_ms": full_ms})
    return rows


def _seconds(model: LoopedForCausalLM, task: Problem, parts: Sequence[Tensor], rule: Rule) -> float:
    start = time.perf_counter()
    for ids_BT in parts:
        run_rule(model, task, ids_BT, rule)
    return time.perf_counter() - start


def run_items(model: LoopedForCausalLM, task: Problem, ids_BT: Tensor, rule: Rule) -> Halted:
    parts = [run_rule(model, task, part, rule) for part in ids_BT.split(ITEMS_AT_ONCE)]
    starts = [p.start_B for p in parts if p.start_B is not None]
    logits_BTV, turns_BT = (torch.cat([getattr(p, name) for p in parts]) for name in ("logits_BTV", "turns_BT"))
    return Halted(logits_BTV, turns_BT, torch.cat(starts) if starts else None)


def controls(model: LoopedForCausalLM, task: Problem, drawn: Batch, halted: Halted, price: float | None) -> dict[str, Any]:
    """Random halting with the same turns, the oracle, and the areas of the gate and of other signals."""
    right_RN, found = readings(model, task, drawn, price)
    turns_N = asked(task, drawn, halted.turns_BT.numpy()) - 1
    turns_oracle, accuracy_oracle = oracle(right_RN)
    chosen_SB = resamples(right_RN.shape[1])
    known = {name: areas(right_RN, signal, len(right_RN), chosen_SB) for name, signal in found.items()}
    return {
        "random_same_turns": shuffled(right_RN.reshape(len(right_RN), -1), turns_N.reshape(-1), 0),
        "oracle_turns": turns_oracle,
        "oracle_accuracy": accuracy_oracle,
        "area": {name: whole for name, (whole, _) in known.items()},
        "gate_ahead_interval": {
            name: middle(known["gate"][1] - every_S) for name, (_, every_S) in known.items() if name != "gate"
        },
    }


def readings(
    model: LoopedForCausalLM, task: Problem, drawn: Batch, price: float | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What is right after each turn and the signals there: of items ``[R, B]`` or of their places ``[R, B, T]``."""
    parts = [signals(model, ids_BT, price) for ids_BT in torch.tensor(drawn.ids_BT).split(ITEMS_AT_ONCE)]
    answers_RBT = np.concatenate([answers for answers, _ in parts], 1)
    found = {name: np.concatenate([signal[name] for _, signal in parts], 1) for name in parts[0][1]}
    if task.unit == "place":
        every = {name: asked(task, drawn, signal) for name, signal in found.items()}
        return asked(task, drawn, answers_RBT == drawn.labels_BT), every
    right_RBT = (answers_RBT == drawn.labels_BT) | given_places(task, drawn)
    return right_RBT.all(-1), {name: s.mean(-1) if name == "gate" else s.min(-1) for name, s in found.items()}


def right(task: Problem, drawn: Batch, found: Halted) -> np.ndarray:
    """Which places are right, or which items, ``[B]``, where these halt as a whole (blanks only count)."""
    same_BT = found.logits_BTV.argmax(-1).numpy() == drawn.labels_BT
    return asked(task, drawn, same_BT | (given_places(task, drawn) if task.unit == "item" else False))


def asked(task: Problem, drawn: Batch, values: np.ndarray) -> np.ndarray:
    """Of values ``[..., B, T]`` those of the places that are asked for, as many of each item; of items one value, ``[..., B]``:
    whether all, or the first."""
    if task.unit == "item":
        return np.asarray(values.all(-1) if values.dtype == bool else values[..., 0])
    known_BT = ~given_places(task, drawn)
    return values if known_BT.all() else values[..., known_BT].reshape(*values.shape[:-1], -1)


def given_places(task: Problem, drawn: Batch) -> np.ndarray:
    """Places of an item that nobody asks about: a puzzle's clues, and those without an answer."""
    return np.asarray((drawn.labels_BT == NONE) | ~task.asked(drawn.ids_BT))


def accuracy(task: Problem, drawn: Batch, found: Halted) -> float:
    """The share of places, or of items, that are right."""
    return float(right(task, drawn, found).mean())


def rank_correlation(task: Problem, drawn: Batch, found: Halted) -> float:
    """Between turns and log difficulty: partial given the place, or plain over items."""
    place_BT = np.broadcast_to(np.arange(drawn.ids_BT.shape[1]), drawn.ids_BT.shape)
    every = found.turns_BT.numpy(), np.log1p(drawn.difficulty_BT), place_BT
    turns, hard, place = (asked(task, drawn, values).ravel() for values in every)
    if task.unit == "item":
        return _spearman(turns, hard)
    th, tp, hp = _spearman(turns, hard), _spearman(turns, place), _spearman(hard, place)
    rest = (1 - tp**2) * (1 - hp**2)
    return float((th - tp * hp) / np.sqrt(rest)) if rest > 0 else 0.0  # a place that tells all leaves nothing to compare


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return 0.0 if a.min() == a.max() or b.min() == b.max() else float(spearmanr(a, b).statistic)


def by_difficulty(task: Problem, drawn: Batch, found: Halted) -> list[dict[str, Any]]:
    """Mean turns and accuracy by the task's own difficulty: distance to the last RESET, number of blanks or hops."""
    hard = asked(task, drawn, drawn.difficulty_BT)
    parts = {(low, high): (hard >= low) & (hard <= high) for low, high in task.bins}
    return [{"from": low, "to": high, **row} for (low, high), row in _rows(task, drawn, found, parts)]


def by_level(task: Puzzles, drawn: Batch, found: Halted) -> list[dict[str, Any]]:
    """Mean turns and accuracy by the technique that a sudoku needs: 1 naked singles, 2 hidden singles, 3 a guess."""
    levels = np.array([task.game.level(board) for board in drawn.ids_BT])
    return [
        {"level": level, **row} for level, row in _rows(task, drawn, found, {level: levels == level for level in (1, 2, 3)})
    ]


def _rows(task: Problem, drawn: Batch, found: Halted, parts: dict[Any, np.ndarray]) -> list[tuple[Any, dict[str, Any]]]:
    turns, good = asked(task, drawn, found.turns_BT.numpy()), right(task, drawn, found)
    every = {key: (int(part.sum()), turns[part].mean(), good[part].mean()) for key, part in parts.items() if part.any()}
    return [(key, {"count": n, "turns": float(t), "accuracy": float(a)}) for key, (n, t, a) in every.items()]
