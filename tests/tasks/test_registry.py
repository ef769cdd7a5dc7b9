"""Every task, whatever its form, can be trained on, solved, shown and reported of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adi
from adi.decoding.looped.solve import solve
from adi.measure.solving import right, run_items, solving_report
from adi.measure.turns import turns_of
from adi.model.looped import LoopedConfig, LoopedForCausalLM
from adi.tasks.registry import TASKS, Grid, Problem
from adi.training.train_looped import TrainSettings, train_looped

ITEMS = {
    "mazes": "S........" + "########." * 8,
    "stories": "mary went to the kitchen . mary took the ball . where is the ball ?",
}
ITEMS["mazes"] = ITEMS["mazes"][:-1] + "G"


def untrained(task: Problem) -> LoopedForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 2, "halt_threshold": 0.05}
    config: LoopedConfig = TrainSettings(task=task.name, model=shape).config(task)
    return LoopedForCausalLM(config).eval()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_test_items_are_asked_for_where_they_have_answers(task: Problem) -> None:
    drawn = task.batch(6, (0,), test=True)
    known = (drawn.labels_BT != -100) & task.asked(drawn.ids_BT)
    assert drawn.ids_BT.shape == drawn.labels_BT.shape == drawn.difficulty_BT.shape == (6, task.length)
    assert 0 <= drawn.ids_BT.min() <= max(drawn.ids_BT.max(), drawn.labels_BT.max()) < task.vocabulary
    assert task.unit == "item" or len(set(known.sum(1))) == 1
    hard = drawn.difficulty_BT[known]
    assert all(any(low <= h <= high for low, high in task.bins) for h in hard.tolist())
    assert all(task.show(i) for i in range(task.vocabulary))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_report_counts_what_is_asked_for(task: Problem) -> None:
    model = untrained(task)
    found = solving_report(model, 8, 3)
    drawn = task.batch(8, (3,), test=True)
    asked = (drawn.labels_BT != -100) & task.asked(drawn.ids_BT)
    answers = model(torch.tensor(drawn.ids_BT)).logits.argmax(-1).numpy()
    same = answers == drawn.labels_BT
    by_hand = same[asked].mean() if task.unit == "place" else (same | ~asked).all(1).mean()
    assert found["accuracy_all_turns"] == pytest.approx(by_hand)
    assert found["by_turn"][-1] == found["accuracy_all_turns"]
    assert sum(row["count"] for row in found["by_difficulty"]) == (asked.sum() if task.unit == "place" else 8)
    assert ("by_level" in found) == task.name.startswith("sudoku")


def test_a_sudoku_report_is_by_technique_too() -> None:
    found = solving_report(untrained(TASKS["sudoku4"]), 60, 0)
    assert sum(row["count"] for row in found["by_level"]) == 60
    assert {row["level"] for row in found["by_level"]} <= {1, 2, 3}


@pytest.mark.parametrize("name", ITEMS)
def test_a_text_is_answered_and_shown(name: str, tmp_path: Path) -> None:
    task, text = TASKS[name], ITEMS[name]
    untrained(task).save_pretrained(tmp_path)
    (one,) = solve(tmp_path, [text])
    (alone, _) = solve(tmp_path, [text, text])
    assert one == alone
    if isinstance(task, Grid):
        assert all(shown == given for shown, given in zip(one.answers, text, strict=True) if given != ".")
    else:
        assert one.answers in map(task.show, range(task.vocabulary))
    shown = turns_of(str(tmp_path), text)
    assert shown.summary() in shown.lines()


def test_a_solved_maze_is_said_to_be() -> None:
    task = TASKS["mazes"]
    drawn = task.batch(3, (0,), test=True)
    model = untrained(task)
    done = run_items(model, task, torch.tensor(drawn.ids_BT), _all(model))
    given = torch.nn.functional.one_hot(torch.tensor(drawn.labels_BT), task.vocabulary).float()
    assert right(task, drawn, type(done)(given, done.turns_BT)).all()
    assert isinstance(task, Grid)
    assert all(task.solved(board) for board in drawn.labels_BT.tolist())
    assert not any(task.solved(board) for board in drawn.ids_BT.tolist())


def _all(model: LoopedForCausalLM) -> Any:
    from adi.decoding.looped.solve import halting_rule

    return halting_rule(model, False)


@pytest.mark.parametrize("name", ["products-D4", "products-Z7", "p-hop", "mazes", "stories"])
def test_what_is_trained_on_a_task_answers_its_items(name: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 2}
    train_looped(TrainSettings(task=name, model=shape, steps=2, batch=4), tmp_path)
    assert len(solve(tmp_path, [ITEMS.get(name, [6, 0, 1, 0])])) == 1
    assert turns_of(str(tmp_path), None, 1).lines()


def test_stories_are_a_language_model() -> None:
    """``adi.generate`` on its ids says what transformers' own generate says, verified from any turn."""
    task = TASKS["stories"]
    model, ids = untrained(task), task.parse(ITEMS["stories"])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    for policy in (adi.FullDepth(), adi.Verified()):
        found = adi.generate(adi.load(model), list(ids), policy, max_new_tokens=8)
        assert list(found.token_ids) == wanted
    labels = task.batch(2, (0,)).labels_BT
    assert np.isin(labels, [-100, *range(task.vocabulary)]).all()
