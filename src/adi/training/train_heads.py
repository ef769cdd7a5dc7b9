"""Fit exit heads: the base stays as it is, each depth's adapter learns the full model's distribution (KL).

The loss is the Kullback-Leibler divergence from the full model's distribution over shortlist and tail to the head's
(distillation, Hinton et al. 2015; for exits, Belrose et al. 2023). All depths learn from the same rows at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adi.exits.heads import Adapter, fresh_adapter, predict
from adi.exits.signals import Prediction
from adi.progress import Progress
from adi.training.shards import Shard, Teacher, read_shard
from adi.training.trainer import OptimizerOptions, Update, train


@dataclass(frozen=True)
class HeadOptions:
    """``rows`` of a step, passes over the data, peak learning rate, adapter rank, seed."""

    rows: int = 512
    epochs: int = 3
    learning_rate: float = 3e-3
    rank: int = 128
    seed: int = 0


def divergence(head: Prediction, teacher_NS: Tensor, tail_N: Tensor) -> Tensor:
    """KL(full model || head) over shortlist and tail, in nats, ``[N]``."""
    assert head.tail_T is not None
    teacher_NS = teacher_NS.float()
    inside = (teacher_NS.exp() * (teacher_NS - head.log_probs_TS)).sum(-1)
    return inside + tail_N.exp() * (tail_N - head.tail_T)


def fit_heads(
    teacher: Teacher,
    depths: Sequence[int],
    shards: Sequence[Path],
    checkpoint: Path,
    options: HeadOptions,
    progress: Progress,
    begin: Mapping[int, Adapter] | None = None,
) -> dict[int, Adapter]:
    """Train an adapter per depth on ``shards`` with states at these depths, going on from ``checkpoint`` if it is there.

    They start from ``begin``, or else from fresh ones.
    """
    generator = torch.Generator().manual_seed(options.seed)
    if begin is None:
        adapters = {d: fresh_adapter(teacher.readout, options.rank, generator) for d in depths}
    else:
        adapters = {d: Adapter(**{n: t.float().clone() for n, t in begin[d].tensors().items()}) for d in depths}
    # an RMS norm has no shift, and the merged head no place for one
    fixed = () if teacher.readout.norm == "layer" else ("shift_D",)
    parameters = [t.requires_grad_() for a in adapters.values() for n, t in a.tensors().items() if n not in fixed]

    def loss(rows: Shard, i: int, depth: int) -> Tensor:
        head = predict(adapters[depth], teacher.among, rows.hidden_NED[:, i])
        return divergence(head, *teacher.logs(rows.deep_ND, rows.total_N)).mean()

    def updates(path: Path, dice: torch.Generator) -> list[Update]:
        shard = read_shard(path)
        places = shard.answer_N.nonzero()[:, 0]
        batches = places[torch.randperm(len(places), generator=dice)].split(options.rows)
        # depth by depth, so that one depth's logits are in memory at a time
        return [[partial(loss, shard.rows(batch), i, depth) for i, depth in enumerate(depths)] for batch in batches]

    how = OptimizerOptions(options.epochs, options.learning_rate, (0.9, 0.98), 5.0, options.seed)
    train(parameters, shards, checkpoint, how, updates, progress, "training heads")
    return {d: Adapter(**{n: t.detach() for n, t in a.tensors().items()}) for d, a in adapters.items()}
