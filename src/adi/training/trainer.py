"""What all trainers share: AdamW under a warm-up and half a cosine, shard by shard, with a checkpoint after each."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adi.errors import AdiError, FileError
from adi.files import require_readable, whole_file, write_text
from adi.model.hub import first_line
from adi.progress import Progress

PARTS = 100  # of a shard, in which progress is counted
Update = Sequence[Callable[[], Tensor]]  # losses of one update, each propagated back before the next is worked out


@dataclass(frozen=True)
class OptimizerOptions:
    """Passes over the shards, peak learning rate, moments of AdamW, largest norm of a gradient, seed."""

    epochs: int
    learning_rate: float
    betas: tuple[float, float]
    clip: float
    seed: int


def train(
    parameters: Sequence[Tensor] | Sequence[dict[str, Any]],
    shards: Sequence[Path],
    checkpoint: Path,
    options: OptimizerOptions,
    updates: Callable[[Path, torch.Generator], Sequence[Update]],
    progress: Progress,
    what: str,
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """Change ``parameters`` (or groups of them, each with its "lr") by the losses of ``updates(shard, dice)``, going on from
    ``checkpoint`` if it is there; ``after`` is called with the shards done, first with those of before.

    An interrupted run ends with the very values of an undisturbed one. AdiError where a loss is no number: the checkpoint is
    then the last good one.
    """
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, betas=options.betas, weight_decay=0.0)
    tensors = parameters_of(optimizer)
    total, begun = options.epochs * len(shards), load_checkpoint(checkpoint, tensors, optimizer)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: schedule(at / total), last_epoch=begun - 1)
    after(begun)
    for at in range(begun, total):
        order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(options.seed + at // len(shards)))
        dice = torch.Generator().manual_seed(options.seed + 7919 * at)
        todo, losses = updates(shards[int(order[at % len(shards)])], dice), list[float]()
        for n, update in enumerate(todo):
            losses.append(descend(optimizer, update, options.clip))
            if not math.isfinite(losses[-1]):
                raise AdiError(f"{what}: a loss is {losses[-1]}; the last good checkpoint, after {at} parts, is {checkpoint}.")
            progress(at * PARTS + PARTS * n // len(todo), total * PARTS, f"{what}, loss {sum(losses) / len(losses):.2f}")
        rate.step()
        save_checkpoint(checkpoint, at + 1, tensors, optimizer)
        progress((at + 1) * PARTS, total * PARTS, f"{what}, loss {sum(losses) / max(1, len(losses)):.2f}")
        after(at + 1)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Those of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def descend(optimizer: torch.optim.Optimizer, update: Update, clip: float = math.inf) -> float:
    """One step of the optimizer; the mean of the update's losses."""
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for loss_of in update:
        loss = loss_of()
        loss.backward()
        losses.append(float(loss.detach()))
    torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), clip)
    optimizer.step()
    return sum(losses) / len(losses)


def schedule(share: float) -> float:
    """A short rise, then half a cosine down to a tenth."""
    return min(1.0, share / 0.03 + 0.1) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def save_checkpoint(path: Path, done: int, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Values and moments after ``done`` shards, whole or not at all."""
    with whole_file(path) as fresh:
        torch.save({"done": done, "parameters": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()}, fresh)


def load_checkpoint(path: Path, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Shards done, 0 without a checkpoint; FileError for a damaged one, whose values may have been taken over in part."""
    if not path.exists():
        return 0
    require_readable(path)
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)  # which runs no code
        with torch.no_grad():
            for parameter, saved in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        return int(state["done"])
    except Exception as error:  # what a damaged or foreign file makes the reader raise
        raise FileError(
            f"the checkpoint {path} is damaged or foreign ({first_line(error)}); delete it to begin again."
        ) from None


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """The ``state_dict`` in a file; FileError for a damaged or foreign one."""
    require_readable(path)
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # what a damaged or foreign file makes the reader raise
        raise FileError(
            f"the weights {path} are damaged or foreign ({first_line(error)}); delete them to begin again."
        ) from None


def fresh_checkpoint(path: Path, value: object) -> Path:
    """The checkpoint, deleted where it was begun with another value (options and data, as a ``repr`` tells them)."""
    note, text = path.with_suffix(".key"), hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
    if note.exists() and note.read_text() != text:
        path.unlink(missing_ok=True)
    write_text(note, text)
    return path


def quicker_in_bfloat16(note: Path) -> bool:
    """Whether this processor multiplies faster in bfloat16; noted in a file, so that a resumed run makes the same choice."""
    if not note.exists():
        write_text(note, "bfloat16" if _product_seconds(torch.bfloat16) < 0.8 * _product_seconds(torch.float32) else "float32")
    return note.read_text() == "bfloat16"


def _product_seconds(dtype: torch.dtype) -> float:
    a, b = (torch.ones(shape, dtype=dtype) for shape in ((64, 1024), (1024, 1024)))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        times.append(time.perf_counter() - start)
    return sorted(times)[3]
