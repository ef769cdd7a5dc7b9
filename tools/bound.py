"""What bounds verified decoding: ``python tools/bound.py docs/results/bound.json``.

The default model's own greedy answers to the bench prompts, how often its drafter is right in them (by step, those before it
right, and by category), and what passes cost on this machine. From both follows what drafting by the network alone can give at
best, with Python and all else for nothing, and how often drafts would have to be right for what issue 4 asks.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from torch import Tensor

import adi
from adi.decoding.costs import Costs, costs_of
from adi.exits.heads import shortlist
from adi.files import write_json
from adi.measure.circumstances import circumstances
from adi.prompts import read_prompts
from adi.training.answers import Answer
from adi.training.drafting import judge
from adi.training.kinds import Kinds
from adi.training.tracks import write_tracks

TOKENS, WANTED, LONGEST = 128, 1.6, 6
TOGETHER = 16


def gain(costs: Costs, rights: Sequence[float]) -> tuple[float, int]:
    """Tokens per second against full depth, and the number of drafts, where the k-th draft in a row is right so often."""
    alive = list(accumulate(rights, mul))
    plain = costs.rows(1)
    found = [(1.0, 0)]
    for drafts in range(1, len(rights) + 1):
        seconds = costs.rows(drafts + 1) + costs.drafting(drafts)
        found.append(((1 + sum(alive[:drafts])) * plain / seconds, drafts))
    return max(found)


def needed(costs: Costs, rights: Sequence[float]) -> float | None:
    """By how much all of them must rise for what is wanted; None where even certainty is not enough."""
    for points in range(101):
        if gain(costs, [min(1.0, right + points / 100) for right in rights])[0] >= WANTED:
            return points / 100
    return None


def answered(model: adi.Model) -> list[Answer]:
    """The model's own greedy answers to the bench prompts, in their order."""
    prompts = [item.prompt for item in read_prompts("bench")]
    texts = adi.generate_batch(model, prompts, max_new_tokens=TOKENS, most=TOGETHER)
    return [
        Answer(prompt, (*t.prompt_ids, *t.token_ids), len(t.prompt_ids), True, True)
        for prompt, t in zip(prompts, texts, strict=True)
    ]


def measured(precision: str) -> dict[str, Any]:
    items = read_prompts("bench")
    model, exits = adi.load("smollm2-135m", precision=precision), adi.load_exits("smollm2-135m")
    backbone, drafter, drafting = model.backbone, exits.drafter, exits.drafting(model.backbone)
    assert drafter is not None
    assert drafting is not None
    backbone.prepare((), drafts=True, wait=True)
    costs = costs_of(backbone, drafting.key, drafting.try_once)
    answers = answered(model)
    kinds = Kinds({answer.ids[: answer.start]: item.category for item, answer in zip(items, answers, strict=True)})
    readout = backbone.readout().tensors()
    with tempfile.TemporaryDirectory() as folder:
        shards = write_tracks(backbone, answers, Path(folder), lambda done, of: print(precision, done, of, flush=True))
        said = judge(drafter.map(Tensor.clone), readout, shortlist(readout, drafter.ids_S), backbone.embed, shards, kinds)
    rights = [*said["agreement_by_step"], said["agreement_by_step"][-1]][:LONGEST]
    best, drafts = gain(costs, rights)
    return {
        "precision": precision,
        "pass_seconds": {str(rows): costs.rows(rows) for rows in (1, 2, 3, 4, 6, 8)},
        "draft_seconds": [costs.drafting(steps) for steps in (1, 2, 3)],
        **{name: said[name] for name in ("agreement_by_step", "accepted_in_a_row", "positions", "by_category")},
        "gain": best,
        "drafts": drafts,
        "needed_points": needed(costs, rights),
    }


def main(out: Path) -> None:
    rows = []
    for precision in ("int4", "int8"):
        rows.append(measured(precision))
        print(rows[-1], flush=True)
    about = circumstances(f"python tools/bound.py {out}", read_prompts("bench"))
    write_json(out, {"format": "adi-bound", **about, "max_new_tokens": TOKENS, "wanted": WANTED, "precisions": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
