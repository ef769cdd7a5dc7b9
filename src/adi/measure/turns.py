"""One item turn by turn: what the model would answer after each, and where it halts; for a terminal and as a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adi.decoding.looped.halting import Rule, run_halting
from adi.decoding.looped.solve import halting_rule, run_rule, task_of
from adi.errors import UsageError
from adi.measure.pages import render
from adi.model.load import load_looped
from adi.tasks.hops import Hops
from adi.tasks.registry import Chains, Grid, Problem, Products, Puzzles

SURE = 0.9  # an answer of at least this probability is shown as sure


@dataclass(frozen=True)
class Turns:
    """``answers_RT`` and their probabilities ``sure_RT`` after each turn, up to the last that any place took; ``halted_T`` is
    the turn at which each place halted."""

    task: Problem
    item: tuple[int, ...]
    answers_RT: list[list[int]]
    sure_RT: list[list[float]]
    halted_T: list[int]
    trained: int

    def cell(self, turn: int, place: int) -> tuple[str, str]:
        """What to show after a turn at a place, and how: "given", "open", "sure" or "halted"."""
        if self.task.unit == "item" and not self._asked()[place]:
            return self.task.show(self.item[place]), "given"
        answer = self.task.show(self.answers_RT[turn - 1][place])
        if self.task.unit == "place" and turn >= self.halted_T[place]:
            return answer, "halted"
        return answer, "sure" if self.sure_RT[turn - 1][place] >= SURE else "open"

    def summary(self) -> str:
        """The sentence below the picture."""
        if isinstance(self.task, Grid):
            final = np.where(self._asked(), self.answers_RT[-1], self.item).tolist()
            state = "solved" if self.task.solved(final) else "not solved"
            return f"{state} in {self.halted_T[0]} turns of {self.trained}: {''.join(map(self.task.show, final))}"
        if isinstance(self.task, Chains):
            return f"halted after {self.halted_T[0]} turns of {self.trained}"
        mean = sum(self.halted_T) / len(self.halted_T)
        return f"{mean:.2f} turns of {self.trained} on average; each place shows its answer from the turn on at which it halted"

    def _asked(self) -> np.ndarray:
        found: np.ndarray = self.task.asked(np.array([self.item]))[0]
        return found

    def _parts(self) -> tuple[list[int], list[int]]:
        """The places that are given, and those that are asked for."""
        asked = self._asked().tolist()
        return [p for p, is_asked in enumerate(asked) if not is_asked], [p for p, is_asked in enumerate(asked) if is_asked]

    def _size(self) -> int:
        if isinstance(self.task, Grid):
            return self.task.game.size if isinstance(self.task, Puzzles) else self.task.size
        return len(self.item)

    def rows(self) -> list[list[int]]:
        """The places of one turn, line by line: a puzzle's rows, or all places in one."""
        size = self._size()
        return [list(range(i, i + size)) for i in range(0, len(self.item), size)]

    def lines(self) -> list[str]:
        """For a terminal, in rich's markup: puzzles side by side, a text's turns one below the other."""
        style = {"given": "bold", "open": "dim", "sure": "yellow", "halted": "green"}

        def drawn(turn: int, places: list[int]) -> str:
            return " ".join(f"[{style[kind]}]{text}[/]" for text, kind in (self.cell(turn, p) for p in places))

        turns = range(1, len(self.answers_RT) + 1)
        if isinstance(self.task, Chains):
            given, starts = (" ".join(self.task.show(self.item[p]) for p in places) for places in self._parts())
            return [
                given,
                f"start  {starts}",
                *(f"turn {turn} {drawn(turn, self._parts()[1])}" for turn in turns),
                self.summary(),
            ]
        if not isinstance(self.task, Grid):
            ids = "  ids  " + " ".join(map(self.task.show, self.item))
            return [
                ids,
                *(f"turn {turn} {drawn(turn, self.rows()[0])}" for turn in turns),
                f"halted {' '.join(map(str, self.halted_T))}",
                self.summary(),
            ]
        width, per_line = 2 * self._size() + 2, 6
        found = [" ".join(self.task.show(self.item[place]) for place in places) for places in self.rows()] + [""]
        for first in range(1, len(turns) + 1, per_line):
            chosen = [turn for turn in turns if first <= turn < first + per_line]
            found.append("".join(f"turn {turn}".ljust(width) for turn in chosen))
            found += ["   ".join(drawn(turn, places) for turn in chosen) for places in self.rows()]
            found.append("")
        return [*found, self.summary()]


def turns_of(source: Any, item: str | None, seed: int = 0, **halting: Any) -> Turns:
    """An item, by default a test item drawn from ``seed``, turn by turn; ``halting`` are options of ``halting_rule``."""
    model = load_looped(source)
    task = task_of(model)
    chosen = _item(task, item, seed)
    rule = halting_rule(model, **halting)
    ids_BT = torch.tensor([chosen])
    halted_T = run_rule(model, task, ids_BT, rule).turns_BT[0].tolist()
    found = [
        run_halting(model, ids_BT, Rule(None, turn)).logits_BTV[0].softmax(-1).max(-1) for turn in range(1, max(halted_T) + 1)
    ]
    return Turns(task, chosen, [f.indices.tolist() for f in found], [f.values.tolist() for f in found], halted_T, rule.most)


def _item(task: Problem, item: str | None, seed: int) -> tuple[int, ...]:
    if item is None:
        drawn = task.batch(8 if isinstance(task, Grid) else 1, (seed,), test=True)
        return tuple(drawn.ids_BT[drawn.difficulty_BT[:, 0].argmax()].tolist())  # of puzzles a hard one
    if not isinstance(task, Products | Chains | Hops):
        return task.parse(item)
    try:
        return task.parse([int(part) for part in item.split(",")])
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{item!r} is no list of ids; write numbers with commas, such as 1,4,6,2.") from None


def turns_page(shown: Turns) -> str:
    """The same as a self-contained HTML page."""
    turns = [
        {
            "turn": turn,
            "rows": [
                [dict(zip(("text", "kind"), shown.cell(turn, p), strict=True)) for p in places] for places in shown.rows()
            ],
        }
        for turn in range(1, len(shown.answers_RT) + 1)
    ]
    return render(
        "turns.html",
        task=shown.task.name,
        turns=turns,
        halted=shown.halted_T,
        summary=shown.summary(),
        puzzle=isinstance(shown.task, Grid),
    )
