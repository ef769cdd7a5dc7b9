"""What trained exits are worth on held-out text, and the trigger thresholds that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adi.exits.heads import Adapter, Shortlist, predict
from adi.exits.signals import entropy
from adi.exits.triggers import Never, Threshold, Trigger
from adi.model.backbone import Backbone
from adi.training.shards import Shard, read_shards
from adi.training.train_heads import divergence

PRECISION = 0.85
FEWEST_FIRED = 0.03
BARE_ROWS = 2000


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


@dataclass(frozen=True)
class Held:
    """Held-out rows at one depth: whether the exit was right, and its entropy."""

    right_N: Tensor
    entropy_N: Tensor
    divergence: float


def evaluate(
    backbone: Backbone,
    adapters: Mapping[int, Adapter],
    among: Shortlist,
    shards: Sequence[Path],
    kinds: Sequence[str] = (),
) -> tuple[list[DepthReport], Trigger, dict[str, Any]]:
    """Per-depth reports, the default trigger, and figures on the held-out text as a whole. ``kinds``: the category of each
    held-out sequence, by its number, where reports are to have them apart."""
    parts = list(read_shards(shards))
    joined = Shard(*(torch.cat([getattr(p, n) for p in parts]) for n in Shard.__dataclass_fields__))
    reports, thresholds = [], {}
    left_N = torch.ones(joined.token_N.shape[0], dtype=torch.bool)  # rows that no shallower exit has decided
    for i, (depth, adapter) in enumerate(adapters.items()):
        held = _held(adapter, among, joined, i)
        threshold = loosest_threshold(held.entropy_N[left_N], held.right_N[left_N], len(left_N))
        fired_N = left_N & (held.entropy_N <= threshold) if threshold is not None else torch.zeros_like(left_N)
        left_N &= ~fired_N
        if threshold is not None:
            thresholds[depth] = threshold
        reports.append(
            DepthReport(
                depth=depth,
                agreement=_share(held.right_N),
                bare_agreement=_bare(backbone, joined, i),
                divergence=held.divergence,
                threshold=threshold,
                fires=_share(fired_N),
                precision=_share(held.right_N[fired_N]),
                by_category=_by_category(held.right_N, joined.sequence_N, kinds),
            )
        )
    covered = torch.isin(joined.token_N, among.ids_S.int())
    totals = {
        "rows": int(joined.token_N.shape[0]),
        "sequences": int(joined.sequence_N.unique().numel()),
        "shortlist_coverage": round(_share(covered), 4),
    }
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
    rows = [{k: _rounded(v) for k, v in asdict(r).items()} for r in reports]
    return {"held_out": dict(totals), "training_tokens": tokens, "target_precision": PRECISION, "depths": rows}


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _by_category(right_N: Tensor, sequence_N: Tensor, kinds: Sequence[str]) -> dict[str, float]:
    """The share of right rows in each category."""
    named = {kind: torch.tensor([i for i, of in enumerate(kinds) if of == kind]) for kind in sorted(set(kinds))}
    masks = {kind: torch.isin(sequence_N, numbers.int()) for kind, numbers in named.items()}
    return {kind: _share(right_N[mask_N]) for kind, mask_N in masks.items() if bool(mask_N.any())}


@torch.no_grad()
def _held(adapter: Adapter, among: Shortlist, rows: Shard, i: int) -> Held:
    right, entropies, losses = [], [], []
    for part in torch.arange(rows.token_N.shape[0]).split(1024):
        said = predict(adapter, among, rows.hidden_NED[part, i])
        right.append(among.ids_S[said.log_probs_TS.argmax(-1)] == rows.token_N[part])
        entropies.append(entropy(said))
        losses.append(divergence(said, rows.teacher_NS[part], rows.tail_N[part]))
    return Held(torch.cat(right), torch.cat(entropies), float(torch.cat(losses).mean()))


def _bare(backbone: Backbone, rows: Shard, i: int) -> float:
    """The untrained exit, for comparison: the model's own final norm and head on an even sample of the rows."""
    sample = torch.linspace(0, rows.token_N.shape[0] - 1, min(BARE_ROWS, rows.token_N.shape[0])).long()
    right = []
    for part in sample.split(256):
        hidden_TD = rows.hidden_NED[part, i].float()
        right.append(backbone.logits(hidden_TD).argmax(-1).cpu() == rows.token_N[part])
    return _share(torch.cat(right))


def _share(flags_N: Tensor) -> float:
    return float(flags_N.float().mean()) if flags_N.numel() else 0.0
