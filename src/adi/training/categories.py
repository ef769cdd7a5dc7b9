"""What kind of task a text belongs to, so that reports can say where exits and drafters do well and where they do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adi.training.answers import Answer
from adi.training.drafter_shards import DrafterShard

OTHER = "other"


@dataclass(frozen=True)
class Categories:
    """Categories of prompts, by their token ids. What is not among them (plain text, prompts that the model wrote itself) is
    "other"."""

    known: Mapping[tuple[int, ...], str] = field(default_factory=dict)

    @classmethod
    def of(cls, categories: Mapping[str, str], encode: Callable[[str], Sequence[int]]) -> Categories:
        """From the category of each prompt's text; ``encode`` gives what an answer follows."""
        return cls({tuple(encode(prompt)): category for prompt, category in categories.items()})

    def named(self, answer: Answer) -> str:
        """The category of one answer."""
        return self.known.get(answer.ids[: answer.start], OTHER)

    def numbered(self, tracks: DrafterShard) -> tuple[list[str], Tensor]:
        """The categories met in a shard, and for each of its N positions the place in that list, ``[N]``."""
        counts = tracks.sequence_N.unique_consecutive(return_counts=True)[1]
        parts = zip(tracks.ids_N.split(counts.tolist()), tracks.answer_N.split(counts.tolist()), strict=True)
        names = [self.known.get(tuple(ids[: int(said.int().argmax()) + 1].tolist()), OTHER) for ids, said in parts]
        met = sorted(set(names))
        return met, torch.tensor([met.index(name) for name in names]).repeat_interleave(counts)


class Tally:
    """How often drafts were right, by category and step, those before them in the row having been right."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._asked: dict[str, list[int]] = {}
        self._right: dict[str, list[int]] = {}

    def add(self, names: Sequence[str], kind_R: Tensor, step: int, agreed_R: Tensor) -> None:
        """R drafts at this step, from 1 on, with the place of their category among ``names``."""
        asked = torch.bincount(kind_R, minlength=len(names)).tolist()
        right = torch.bincount(kind_R[agreed_R], minlength=len(names)).tolist()
        for name, of, hits in zip(names, asked, right, strict=True):
            self._asked.setdefault(name, [0] * self._steps)[step - 1] += of
            self._right.setdefault(name, [0] * self._steps)[step - 1] += hits

    def total(self) -> dict[str, Any]:
        """Over all categories: see ``_figures``."""
        asked, right = ([sum(counts) for counts in zip(*by.values(), strict=True)] for by in (self._asked, self._right))
        return _figures(asked or [0] * self._steps, right or [0] * self._steps)

    def by_category(self) -> dict[str, dict[str, Any]]:
        """The same of each category that has any."""
        return {name: _figures(self._asked[name], self._right[name]) for name in sorted(self._asked) if self._asked[name][0]}


def _figures(asked: Sequence[int], right: Sequence[int]) -> dict[str, Any]:
    """Agreement at each step, those before it having agreed; accepted drafts in a row; and positions drafted from."""
    return {
        "agreement_by_step": [hits / max(1, of) for hits, of in zip(right, asked, strict=True)],
        "accepted_in_a_row": sum(right) / max(1, asked[0]),
        "positions": asked[0],
    }
