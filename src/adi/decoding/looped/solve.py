"""``solve``: answers of a looped model to items of its task, each at the depth where its gate halts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adi.arguments import real, whole
from adi.decoding.looped.halting import Halted, Rule, run_halting
from adi.errors import ModelError, UsageError
from adi.model.load import load_looped
from adi.model.looped import LoopedForCausalLM
from adi.tasks.registry import Chains, Grid, Problem, Puzzles, task_named
from adi.tasks.stories import Stories

BACKENDS = ("hf", "openvino")
ITEMS_AT_ONCE = 256  # of one pass
NOISE = 1.0  # root mean square of what is added to a further start's first state: as large as a state after a turn


@dataclass(frozen=True)
class Solved:
    """The answer to one item.

    ``answers``: one id per place (of pointers one per start), the cells of a puzzle as a text, or a story's word. ``turns``:
    how many the answer took, a number per place, or one for a puzzle, pointers and a story. ``sure``: the probability of the
    answer, per place, or that of the least sure cell or start. ``start``: which of several runs won, 0 the item as it is.
    """

    answers: list[int] | str
    turns: list[int] | int
    sure: list[float] | float
    start: int = 0


def task_of(model: LoopedForCausalLM) -> Problem:
    """The task that a model was trained on; ModelError where it names none, or one that does not fit its sizes."""
    config = model.config
    if config.task is None:
        raise ModelError(
            f"the config.json of this {type(model).__name__} names no 'task', so items have no form; train it with adi train."
        )
    task = task_named(config.task)
    if (config.vocab_size, config.causal) != (task.vocabulary, task.causal):
        raise ModelError(
            f"the model is no model of {task.name}: vocab_size {config.vocab_size} and causal {config.causal} are not "
            f"{task.vocabulary} and {task.causal}."
        )
    return task


def solve(
    model: Any,
    items: Sequence[Any],
    halt: bool = True,
    price: float | None = None,
    most: int = 64,
    *,
    threshold: float | None = None,
    beyond_trained: bool = False,
    verified: bool = False,
    starts: int = 1,
    seed: int = 0,
    backend: str = "hf",
) -> list[Solved]:
    """Answer items of a looped model's task.

    Args:
        model: a shipped one by name ("products", "pointers", "sudoku6"), a folder of ``adi train``, or a ``LoopedForCausalLM``.
        items: of products lists of ids (0 to 5 the permutations of (0, 1, 2) in lexicographic order, 6 RESET); of a sudoku
            texts of one character per cell, "." for a blank; of mazes texts of "#", ".", S and G; of stories texts that end
            with a question; of pointers and p-hop lists of ids.
        halt: whether an answer stands as soon as the gate halts; False runs all turns.
        price: nats for a full pass, for a gate that was trained over a range of prices.
        most: turns at most; those that the model was trained for, if fewer, unless ``beyond_trained``.
        threshold: the gate's chance from which on it halts, in the place of the model's own.
        verified: whether the turn after must repeat an answer before it stands.
        starts: of a puzzle or of pointers, so many runs of which the first to halt wins (2601.19085), the surest of several;
            where none halts, the surest. A sudoku starts as it is and under symmetries of the grid, drawn by ``seed``;
            pointers start with noise of root mean square 1 on the first state.
        backend: "hf" (torch) or "openvino" (compiled graphs, which take a second or two before the first answer; they are kept
            with a model that is given as it is, and pay for many items).

    Raises:
        UsageError: an item that is none of the task's, no task, a price or number of turns that the model does not know.
    """
    network = load_looped(model)
    task = task_of(network)
    rule = halting_rule(network, halt, price, most, threshold, beyond_trained, verified, starts, seed, backend)
    parsed = [task.parse(item) for item in items]
    found: dict[int, Solved] = {}
    for chosen in _chunks(parsed):
        ids_BT = torch.tensor([parsed[i] for i in chosen])
        done = run_rule(network, task, ids_BT, rule)
        sure_BT, answers_BT = done.logits_BTV.softmax(-1).max(-1)
        won_B = torch.zeros(len(chosen)) if done.start_B is None else done.start_B
        for row, i in enumerate(chosen):
            found[i] = _solved(task, parsed[i], answers_BT[row], done.turns_BT[row], sure_BT[row], int(won_B[row]))
    return [found[i] for i in range(len(parsed))]


def run_rule(model: LoopedForCausalLM, task: Problem, ids_BT: Tensor, rule: Rule) -> Halted:
    """Items of a task until they halt, from several starts where the rule says so; results are those of the items as given."""
    asked_BT = torch.tensor(task.asked(ids_BT.numpy()))
    if rule.starts == 1:
        return _halted(model, ids_BT, rule, asked_BT)
    if not isinstance(task, Puzzles):
        shape = (rule.starts, ids_BT.shape[1], model.config.hidden_size * model.config.states)
        noise_KTD = NOISE * torch.randn(shape, generator=torch.Generator().manual_seed(rule.seed))
        noise_KTD[0] = 0
        rows, asked = (x.repeat_interleave(rule.starts, 0) for x in (ids_BT, asked_BT))
        return _halted(model, rows, rule, asked, noise_KTD.repeat(len(ids_BT), 1, 1))
    cells_KT, digits_KV = map(torch.tensor, task.game.symmetries(rule.starts, np.random.default_rng(rule.seed)))
    cells_KT[0], digits_KV[0] = torch.arange(cells_KT.shape[1]), torch.arange(digits_KV.shape[1])
    boards_BKT = digits_KV[torch.arange(rule.starts)[:, None], ids_BT[:, cells_KT]]
    boards_NT = boards_BKT.flatten(0, 1)
    found = _halted(model, boards_NT, rule, boards_NT == 0)
    assert found.start_B is not None
    cells_BT, digits_BV = cells_KT[found.start_B], digits_KV[found.start_B]
    logits_BTV = found.logits_BTV.gather(-1, digits_BV[:, None].expand_as(found.logits_BTV))
    index_BTV = cells_BT[..., None].expand_as(logits_BTV)
    return replace(found, logits_BTV=torch.zeros_like(logits_BTV).scatter(1, index_BTV, logits_BTV))


def _halted(model: LoopedForCausalLM, ids_BT: Tensor, rule: Rule, asked_BT: Tensor, noise_BTD: Tensor | None = None) -> Halted:
    if rule.backend == "hf":
        return run_halting(model, ids_BT, rule, asked_BT, noise_BTD)
    from adi.decoding.looped.compiled import compiled  # of an extra

    return compiled(model).run(ids_BT, rule, asked_BT, noise_BTD)


def halting_rule(
    model: LoopedForCausalLM,
    halt: bool = True,
    price: float | None = None,
    most: int = 64,
    threshold: float | None = None,
    beyond_trained: bool = False,
    verified: bool = False,
    starts: int = 1,
    seed: int = 0,
    backend: str = "hf",
) -> Rule:
    """The rule of these options; UsageError for one that has no meaning for this model."""
    most, starts, seed = whole("most", most, 1), whole("starts", starts, 1), whole("seed", seed, 0)
    if starts > 1 and (model.config.causal or not halt):
        why = "halt=False runs all turns" if not halt else "places of a text halt one by one"
        raise UsageError(f"starts is {starts}, a race to halt first, but {why}; leave starts out.")
    price = model.config.judged_price(price) if halt or price is not None else None
    chance = model.config.halt_threshold if threshold is None else threshold
    least = real("threshold", chance, "from 0 to 1, a chance", lambda t: 0 <= t <= 1)
    turns = most if beyond_trained else min(most, model.config.turns)
    if backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}.")
    if backend == "openvino" and importlib.util.find_spec("openvino") is None:
        raise ModelError(f"backend {backend!r} is an extra that is not installed: pip install 'adi-lm[openvino]'.")
    return Rule(least if halt else None, turns, price, verified, starts, seed, backend)


def _chunks(parsed: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
    """Numbers of items of one length, so many at once."""
    order = sorted(range(len(parsed)), key=lambda i: len(parsed[i]))
    for _, same in groupby(order, lambda i: len(parsed[i])):
        numbers = list(same)
        yield from (numbers[i : i + ITEMS_AT_ONCE] for i in range(0, len(numbers), ITEMS_AT_ONCE))


def _solved(task: Problem, item: tuple[int, ...], answers_T: Tensor, turns_T: Tensor, sure_T: Tensor, start: int) -> Solved:
    if isinstance(task, Grid):
        filled = np.where(task.asked(np.array(item)), answers_T.numpy(), item)
        return Solved("".join(map(task.show, filled.tolist())), int(turns_T[0]), float(sure_T.min()), start)
    if isinstance(task, Chains):
        n = task.game.pairs
        return Solved(answers_T[-n:].tolist(), int(turns_T[-1]), float(sure_T[-n:].min()), start)
    if isinstance(task, Stories):
        return Solved(task.show(int(answers_T[-1])), int(turns_T[-1]), float(sure_T[-1]), start)
    return Solved(answers_T.tolist(), turns_T.tolist(), sure_T.tolist())
