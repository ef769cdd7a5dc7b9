"""What trained exits and drafters are worth on held-out text, and the trigger thresholds that follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adi.drafters.datastore import Datastore
from adi.drafters.network import Drafter
from adi.exits.heads import Adapter, predict
from adi.exits.signals import entropy
from adi.exits.triggers import Never, Threshold, Trigger
from adi.model.backbone import Backbone
from adi.progress import Progress, no_progress
from adi.training.shards import Shard, Teacher, read_shard
from adi.training.texts import OTHER, Categories
from adi.training.train_drafter import Embed, draft_text, unroll
from adi.training.train_heads import divergence

PRECISION = 0.85
FEWEST_FIRED = 0.03
BARE_ROWS = 2000
STEPS_SHOWN = 5
FEWEST_DRAFTS = 20  # of a tenth of confidence, for its acceptance to be stated
OPENING = 32  # tokens that tell whether a text is one that training saw


@dataclass(frozen=True)
class DepthReport:
    """One exit on held-out rows: share of rows where its token (and the bare final head's) is the full model's greedy
    one, KL from the full model in nats; and for the default trigger, asked from shallow to deep, the share of all rows that
    it decides here and how often it is then right. ``by_category``: agreement by category of prompt, where it is known."""

    depth: int
    agreement: float
    bare_agreement: float
    divergence: float
    threshold: float | None
    fires: float
    precision: float
    by_category: Mapping[str, float]


def judge_heads(
    backbone: Backbone,
    teacher: Teacher,
    adapters: Mapping[int, Adapter],
    shards: Sequence[Path],
    categories: Categories,
    progress: Progress = no_progress,
) -> tuple[list[DepthReport], Trigger, dict[str, Any]]:
    """Per-depth reports, the default trigger, and figures on the held-out text as a whole."""
    held, kind_N = _rows(shards, categories)
    token_N, kinds = held.token_N, sorted(set(kind_N)) if categories.known else []
    masks = {kind: torch.tensor([of == kind for of in kind_N]) for kind in kinds}
    reports, thresholds = [], {}
    left_N = torch.ones(len(token_N), dtype=torch.bool)  # rows that no shallower exit has decided
    for i, (depth, adapter) in enumerate(adapters.items()):
        progress(i, len(adapters), "judging heads")
        right_N, entropy_N, loss = _judge_depth(adapter, teacher, held, i)
        threshold = loosest_threshold(entropy_N[left_N], right_N[left_N], len(left_N))
        fired_N = left_N & (entropy_N <= threshold) if threshold is not None else torch.zeros_like(left_N)
        left_N &= ~fired_N
        if threshold is not None:
            thresholds[depth] = threshold
        reports.append(
            DepthReport(
                depth=depth,
                agreement=_share(right_N),
                bare_agreement=_bare(backbone, held, i),
                divergence=loss,
                threshold=threshold,
                fires=_share(fired_N),
                precision=_share(right_N[fired_N]),
                by_category={kind: _share(right_N[mask_N]) for kind, mask_N in masks.items()},
            )
        )
    progress(len(adapters), len(adapters), "judging heads")
    covered_N = torch.isin(token_N, teacher.among.ids_S.int())
    texts = sum(len(read_shard(path).lengths) for path in shards)
    totals = {"rows": len(token_N), "sequences": texts, "shortlist_coverage": round(_share(covered_N), 4)}
    return reports, Threshold("entropy", thresholds) if thresholds else Never(), totals


def loosest_threshold(entropy_N: Tensor, right_N: Tensor, of: int, precision: float = PRECISION) -> float | None:
    """The largest entropy up to which at least ``precision`` of the rows are right.

    None if fewer than 3% of the ``of`` rows in all qualify: looking there would cost more than it could save.
    """
    order = entropy_N.argsort()
    share = right_N[order].float().cumsum(0) / torch.arange(1, len(order) + 1)
    good = (share >= precision).nonzero()
    if not len(good) or int(good[-1]) + 1 < FEWEST_FIRED * of:
        return None
    return round(float(entropy_N[order[int(good[-1])]]), 4)


def report_json(reports: Sequence[DepthReport], totals: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The report as ``exits.json`` holds it."""
    rows = json.loads(json.dumps([asdict(report) for report in reports]), parse_float=lambda text: round(float(text), 4))
    return {"held_out": dict(totals), "training_tokens": tokens, "target_precision": PRECISION, "depths": rows}


def _rows(shards: Sequence[Path], categories: Categories) -> tuple[Shard, list[str]]:
    """The rows that predict an answer, and the category of each."""
    parts, kinds = [], list[str]()
    for shard in map(read_shard, shards):
        parts.append(shard.rows(shard.answer_N))
        of_text = [categories.of_text(text) for text in shard.texts]
        kinds += [of_text[number] for number in parts[-1].text_N.tolist()]
    return Shard(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Shard))), kinds


@torch.no_grad()
def _judge_depth(adapter: Adapter, teacher: Teacher, held: Shard, i: int) -> tuple[Tensor, Tensor, float]:
    """Whether the exit was right ``[N]``, its entropy ``[N]``, and its mean divergence."""
    right, entropies, losses = [], [], []
    for part in torch.arange(len(held.token_N)).split(1024):
        rows = held.rows(part)
        head = predict(adapter, teacher.among, rows.hidden_NED[:, i])
        right.append(teacher.among.ids_S[head.log_probs_TS.argmax(-1)] == rows.token_N)
        entropies.append(entropy(head))
        losses.append(divergence(head, *teacher.logs(rows.deep_ND, rows.total_N)))
    return torch.cat(right), torch.cat(entropies), float(torch.cat(losses).mean())


def _bare(backbone: Backbone, held: Shard, i: int) -> float:
    """The untrained exit, for comparison: the model's own final norm and head on an even sample of the rows."""
    sample = torch.linspace(0, len(held.token_N) - 1, min(BARE_ROWS, len(held.token_N))).long()
    logits = [backbone.logits(held.hidden_NED[part, i].float()).argmax(-1).cpu() for part in sample.split(256)]
    return _share(torch.cat(logits) == held.token_N[sample])


def _share(flags_N: Tensor) -> float:
    return float(flags_N.float().mean()) if flags_N.numel() else 0.0


def seen_in(datastore: Datastore) -> Callable[[Shard], Tensor]:
    """Marks the positions ``[N]`` of texts whose answers begin as one of the datastore's does: those that training saw."""
    stored = np.split(datastore.ids_N, np.cumsum(datastore.lengths_M)[:-1])
    openings = {tuple(part[:OPENING].tolist()) for part in stored}

    def mark(shard: Shard) -> Tensor:
        seen = [text.ids[max(0, text.first - 1) :][:OPENING] in openings for text in shard.texts]
        return torch.tensor(seen).repeat_interleave(torch.tensor(shard.lengths))

    return mark


@torch.no_grad()
def judge_drafter(
    net: Drafter,
    teacher: Teacher,
    embed: Embed,
    shards: Sequence[Path],
    categories: Categories | None = None,
    seen: Callable[[Shard], Tensor] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """How drafts fare on answers: agreement with the full model's greedy token at each step, those before it having agreed;
    accepted drafts in a row (of 5); both by category of prompt where ``categories`` knows any; and acceptance by tenth of
    confidence. ``seen`` marks the positions, ``[N]``, of texts that training saw: they are left out."""
    categories = categories or Categories()
    names = sorted({*categories.known.values(), OTHER})
    drafted_CS, right_CS = torch.zeros((2, len(names), STEPS_SHOWN), dtype=torch.long)
    drafted_B, right_B = torch.zeros((2, 10), dtype=torch.long)
    for done, path in enumerate(shards):
        progress(done, len(shards), "judging the drafter")
        text = draft_text(path, teacher, embed)
        shard = text.shard
        kind_N = torch.tensor([names.index(categories.of_text(one)) for one in shard.texts])[shard.text_N]
        alive_N = shard.answer_N.clone() if seen is None else shard.answer_N & ~seen(shard)
        for step in unroll(net, teacher, text, torch.arange(len(alive_N)), STEPS_SHOWN):
            live = alive_N[step.start_R]
            logs_R, place_R = (found[live] for found in step.draft.log_probs_TS.max(-1))
            right_R = teacher.among.ids_S[place_R] == shard.token_N[step.at_R[live]]
            for drafted, right, group_R in (
                (drafted_CS[:, step.step - 1], right_CS[:, step.step - 1], kind_N[step.start_R[live]]),
                (drafted_B, right_B, (logs_R.exp() * 10).clamp(0, 9).long()),
            ):
                drafted += torch.bincount(group_R, minlength=len(drafted))
                right += torch.bincount(group_R[right_R], minlength=len(drafted))
            alive_N = torch.zeros_like(alive_N)
            alive_N[step.start_R[live][right_R]] = True
    progress(len(shards), len(shards), "judging the drafter")
    by_category = {
        name: _draft_figures(drafted_CS[i], right_CS[i])
        for i, name in enumerate(names)
        if categories.known and drafted_CS[i, 0]
    }
    return {
        **_draft_figures(drafted_CS.sum(0), right_CS.sum(0)),
        **({"by_category": by_category} if by_category else {}),
        "acceptance": {str(i): int(right_B[i]) / int(of) for i, of in enumerate(drafted_B) if of >= FEWEST_DRAFTS},
    }


def _draft_figures(drafted_S: Tensor, right_S: Tensor) -> dict[str, Any]:
    """Agreement at each step, those before it having agreed; accepted drafts in a row; and positions drafted from."""
    return {
        "agreement_by_step": (right_S / drafted_S.clamp_min(1)).tolist(),
        "accepted_in_a_row": int(right_S.sum()) / max(1, int(drafted_S[0])),
        "positions": int(drafted_S[0]),
    }
