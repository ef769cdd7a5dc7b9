"""Fit exit heads: the base stays as it is, each depth's adapter learns the full model's distribution (KL).

The loss is the Kullback-Leibler divergence from the full model's distribution over shortlist and tail to the head's
(distillation, Hinton et al. 2015; for exits, Belrose et al. 2023). All depths learn from the same rows at the same time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adi.errors import AdiError
from adi.exits.heads import Adapter, Shortlist, fresh_adapter, predict
from adi.exits.signals import Prediction
from adi.files import write_text
from adi.model.backbone import ReadOut
from adi.training.shards import Shard, read_shard


@dataclass(frozen=True)
class FitOptions:
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


def fit(
    readout: ReadOut,
    among: Shortlist,
    depths: Sequence[int],
    shards: Sequence[Path],
    checkpoint: Path,
    options: FitOptions,
    progress: Callable[[int, int, Mapping[int, float]], None],
) -> dict[int, Adapter]:
    """Train an adapter per depth on ``shards``, resuming from ``checkpoint`` if it is there.

    ``progress(steps, of, loss per depth)`` is told after every shard; the checkpoint is written there as well.
    """
    generator = torch.Generator().manual_seed(options.seed)
    adapters = {d: fresh_adapter(readout, options.rank, generator) for d in depths}
    fixed = () if readout.norm == "layer" else ("shift_D",)  # an RMS norm has no shift, and the merged head no place for one
    parameters = [t.requires_grad_() for a in adapters.values() for n, t in a.tensors().items() if n not in fixed]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    total = options.epochs * len(shards)
    done = resume_state(checkpoint, parameters, optimizer)
    for at in range(done, total):
        order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(options.seed + at // len(shards)))
        shard = read_shard(shards[int(order[at % len(shards)])])
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(at / total)
        losses = [_step(adapters, among, depths, batch, optimizer) for batch in _batches(shard, options, at)]
        save_state(checkpoint, at + 1, parameters, optimizer)
        mean = torch.tensor(losses).mean(0) if losses else torch.zeros(len(depths))
        progress(at + 1, total, dict(zip(depths, mean.tolist(), strict=True)))
    return {d: Adapter(**{n: t.detach() for n, t in a.tensors().items()}) for d, a in adapters.items()}


def _step(
    adapters: Mapping[int, Adapter], among: Shortlist, depths: Sequence[int], batch: Shard, optimizer: torch.optim.Optimizer
) -> list[float]:
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for i, depth in enumerate(depths):  # depth by depth, so that one depth's logits are in memory at a time
        loss = divergence(predict(adapters[depth], among, batch.hidden_NED[:, i]), batch.teacher_NS, batch.tail_N).mean()
        loss.backward()
        losses.append(float(loss.detach()))
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 5.0)
    optimizer.step()
    return losses


def _batches(shard: Shard, options: FitOptions, at: int) -> Iterator[Shard]:
    rows = shard.token_N.shape[0]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(options.seed + 7919 * at))
    for part in order.split(options.rows):
        yield Shard(*(getattr(shard, name)[part] for name in Shard.__dataclass_fields__))


def schedule(share: float) -> float:
    """A short rise, then half a cosine down to a tenth."""
    return min(1.0, share / 0.03 + 0.1) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def save_state(path: Path, done: int, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    partial = path.with_suffix(".tmp")
    torch.save({"done": done, "parameters": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()}, partial)
    partial.replace(path)


def resume_state(path: Path, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Steps done, 0 without a checkpoint; ValueError for a damaged one, whose values may have been taken over in part."""
    if not path.exists():
        return 0
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)  # which runs no code
        with torch.no_grad():
            for parameter, saved in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        return int(state["done"])
    except Exception as error:  # what a damaged or foreign file makes the reader raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise AdiError(f"the checkpoint {path} is damaged or foreign ({first}); delete it to begin again.") from None


def changed(note: Path, value: object) -> bool:
    """Whether ``note`` was written for another value; it is written for this one now. A first time is no change."""
    text = hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
    changed = note.exists() and note.read_text() != text
    write_text(note, text)
    return changed


def fresh_checkpoint(place: Path, value: object) -> None:
    """A checkpoint (``place`` with .pt) only goes on with the options and the data that it was begun with."""
    if changed(place.with_suffix(".key"), value):
        place.with_suffix(".pt").unlink(missing_ok=True)
