"""What a tree of first candidates could give: ``python tools/tree.py docs/results/tree.json``, after ``tools/bound.py``.

How often each of the drafter's likeliest tokens is right after the model's own greedy answers to the bench prompts, and from
this and the costs that ``tools/bound.py`` measured, the best that drafting could give where other first candidates take a row
each and nothing else: no step of the drafter, no row of their own before them, no time of Python. An engine with paged
attention and one sequence to a row has no such rows (a candidate would need its predecessor's row again), so this is an upper
bound.
"""

from __future__ import annotations

import json
import sys
import tempfile
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import torch
from bound import TOKENS, answered
from torch import Tensor

import adi
from adi.exits.heads import shortlist
from adi.files import write_json
from adi.measure.circumstances import circumstances
from adi.prompts import read_prompts
from adi.training.drafting import read_text, unroll
from adi.training.tracks import write_tracks

RANKS = 7
BOUND = Path(__file__).parent.parent / "docs" / "results" / "bound.json"


def ranks(precision: str) -> list[float]:
    """How often the full model's next token is the drafter's first, second, ... candidate."""
    model, drafter = adi.load("smollm2-135m", precision=precision), adi.load_exits("smollm2-135m").drafter
    assert drafter is not None
    readout, net = model.backbone.readout().tensors(), drafter.map(Tensor.clone)
    among = shortlist(readout, net.ids_S)
    right, count = torch.zeros(RANKS), 0
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for path in write_tracks(model.backbone, answered(model), Path(folder), lambda done, of: None):
            text = read_text(path, readout, model.backbone.embed)
            (done,) = unroll(net, readout, among, text, torch.arange(len(text.tracks.answer_N)), 1)
            live_R = text.tracks.answer_N[done.start_R]
            best_RK = among.ids_S[done.said.log_probs_TS[live_R].topk(RANKS).indices]
            right += (best_RK == text.tracks.token_N[done.at_R[live_R], None]).float().sum(0)
            count += int(live_R.sum())
    return [float(share) for share in right / count]


def gain(bound: dict[str, Any], shares: list[float], candidates: int) -> float:
    """Against full depth, with so many first candidates beside the drafter's own, at the best number of drafts in a row."""
    known = {int(rows): seconds for rows, seconds in bound["pass_seconds"].items()}
    steps, alive = bound["draft_seconds"], list(accumulate(bound["agreement_by_step"], mul))
    found = []
    for drafts in range(1, len(steps) + 1):
        rows = next((r for r in sorted(known) if r >= 1 + drafts + candidates), None)
        if rows is not None:
            tokens = 1 + sum(alive[:drafts]) + sum(shares[1 : 1 + candidates])
            found.append(tokens * known[1] / (known[rows] + steps[drafts - 1]))
    return float(max(found))


def main(out: Path) -> None:
    rows = []
    for bound in json.loads(BOUND.read_text())["precisions"]:
        shares = ranks(bound["precision"])
        gains = [gain(bound, shares, candidates) for candidates in range(RANKS - 1)]
        rows.append({"precision": bound["precision"], "right_by_rank": shares, "gain_by_candidates": gains})
        print(rows[-1], flush=True)
    about = circumstances(f"python tools/tree.py {out}", read_prompts("bench"))
    write_json(out, {"format": "adi-tree", **about, "max_new_tokens": TOKENS, "precisions": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
