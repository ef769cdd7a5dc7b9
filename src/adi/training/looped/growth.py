"""``Growth``: easy items first; the hardest grow by a hop whenever those at hand are answered.

A chain of look-ups has no gradient before its links are learned, and a network that has long had two hops alone is slow to
learn the third: so how fast they grow follows what is right (a curriculum; Bengio et al. 2009), not the number of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adi.tasks.products import Batch
from adi.tasks.registry import Problem, easier, most_hops

STEPS, RIGHT = 25, 0.97  # so many steps in a row decide; so large a share of answers right, of all hops at hand, is enough


class Growth:
    """How many hops items have at most while they grow; ``state`` is what a checkpoint keeps."""

    def __init__(self, task: Problem) -> None:
        self.task = task
        self.state = {"growth.hops": torch.tensor(1), "growth.right": torch.tensor(0.0), "growth.steps": torch.tensor(0)}

    @property
    def hops(self) -> int:
        return int(self.state["growth.hops"])

    def batch(self, count: int, seed: Sequence[int]) -> Batch:
        """Items of at most so many hops."""
        return easier(self.task, self.hops).batch(count, seed)

    def judge(self, right: Tensor) -> None:
        """Take in the share of a step's answers that were right."""
        self.state["growth.right"] += right.cpu()
        self.state["growth.steps"] += 1
        if int(self.state["growth.steps"]) == STEPS:
            if float(self.state["growth.right"]) >= RIGHT * STEPS:
                self.state["growth.hops"] += self.hops < most_hops(self.task)
            self.state["growth.right"].zero_()
            self.state["growth.steps"].zero_()
