"""What drafters learn from: every position's last state, in shards on disk.

One full pass over each answer gives them. What the full model says at a position follows from its last state, so no
logits are kept, only the logarithm of their total. Shards are written one by one; a stopped run goes on with the first
that is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adi.errors import AdiError
from adi.model.backbone import Backbone, Rows
from adi.training.answers import Answer
from adi.training.shards import in_halves

SHARD_SEQUENCES = 64
MOST_POSITIONS = 640
HEAD_ROWS = 128


@dataclass(frozen=True)
class DrafterShard:
    """Sequences end to end, N positions in all: token ids ``[N]``, last states ``[N, D]``, ``logsumexp`` of the full model's
    logits ``[N]``, its greedy token ``[N]``, the number of the sequence ``[N]`` and whether the model says an answer token
    next ``[N]``."""

    ids_N: Tensor
    deep_ND: Tensor
    total_N: Tensor
    token_N: Tensor
    sequence_N: Tensor
    answer_N: Tensor


def write_drafter_shards(
    backbone: Backbone, answers: Sequence[Answer], folder: Path, progress: Callable[[int, int], None]
) -> list[Path]:
    """One shard per ``SHARD_SEQUENCES`` answers, named after their tokens and the model; those there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for at in range(0, len(answers), SHARD_SEQUENCES):
        group = answers[at : at + SHARD_SEQUENCES]
        key = repr([backbone.spec.fingerprint, [(a.ids, a.start) for a in group]])
        path = folder / f"{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.safetensors"
        if not path.exists():
            parts = [_track(backbone, answer, i) for i, answer in enumerate(group)]
            write_shard(path, parts)
        paths.append(path)
        progress(min(at + SHARD_SEQUENCES, len(answers)), len(answers))
    return paths


def write_shard(path: Path, parts: Sequence[DrafterShard]) -> None:
    """Sequences end to end, whole or not at all."""
    partial = path.with_suffix(".tmp")
    save_file({n: torch.cat([getattr(p, n) for p in parts]) for n in DrafterShard.__dataclass_fields__}, partial)
    partial.replace(path)


def read_drafter_shard(path: Path) -> DrafterShard:
    """A shard; ValueError for a damaged one."""
    try:
        return DrafterShard(**load_file(path))
    except Exception as error:  # what a damaged or foreign file makes the reader raise
        raise AdiError(f"the shard {path} is damaged ({error}); delete it to make it again.") from None


def _track(backbone: Backbone, answer: Answer, number: int) -> DrafterShard:
    ids = answer.ids[:MOST_POSITIONS]
    cache = backbone.new_cache()
    deep_TD = backbone.forward([Rows(cache, 0, ids, None)], 0, backbone.spec.layers)[0].hidden_TD
    cache.close()
    totals, tokens = [], []
    for rows_TD in deep_TD.split(HEAD_ROWS):
        logits_TV = backbone.logits(rows_TD)
        totals.append(logits_TV.logsumexp(-1).cpu())
        tokens.append(logits_TV.argmax(-1).int().cpu())
    positions = torch.arange(len(ids))
    return DrafterShard(
        ids_N=torch.tensor(ids, dtype=torch.int32),
        deep_ND=in_halves(deep_TD).cpu(),
        total_N=torch.cat(totals).float(),
        token_N=torch.cat(tokens),
        sequence_N=torch.full((len(ids),), number, dtype=torch.int32),
        answer_N=positions >= answer.start - 1,
    )
