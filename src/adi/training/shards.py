"""What heads learn from: the states at every exit depth, and what the full model says there, in shards on disk.

One full pass over each sequence, stopped at every depth on the way, gives both. Shards are written one by one and a
stopped run goes on with the first that is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adi.errors import AdiError
from adi.model.backbone import Backbone, Rows
from adi.training.answers import Answer

SHARD_SEQUENCES = 32
HALF_LIMIT = 6e4


@dataclass(frozen=True)
class Shard:
    """N rows: states ``[N, E, D]`` at E depths, the full model's log-probabilities over the shortlist ``[N, S]`` and of
    everything else ``[N]``, its greedy token ``[N]``, and the number of the sequence that each row came from ``[N]``."""

    hidden_NED: Tensor
    teacher_NS: Tensor
    tail_N: Tensor
    token_N: Tensor
    sequence_N: Tensor


def choose_shortlist(answers: Sequence[Answer], vocabulary: int, size: int) -> Tensor:
    """The ``size`` tokens met most often in the training answers, ascending; low ids fill up what is missing.

    (In byte-pair vocabularies low ids are early merges, which are the frequent ones.)
    """
    counts = Counter(token for a in answers if not a.held_out for token in a.ids[a.start :])
    often = [token for token, _ in counts.most_common(size)]
    chosen = set(often)
    fill = (token for token in range(vocabulary) if token not in chosen)
    often += [token for _, token in zip(range(min(size, vocabulary) - len(often)), fill, strict=False)]
    return torch.tensor(sorted(often))


def write_shards(
    backbone: Backbone,
    answers: Sequence[Answer],
    depths: Sequence[int],
    ids_S: Tensor,
    folder: Path,
    progress: Callable[[int, int], None],
) -> list[Path]:
    """One shard per ``SHARD_SEQUENCES`` answers; those already there are kept, if they were made from the same settings."""
    folder.mkdir(parents=True, exist_ok=True)
    _same_settings(folder, backbone.spec.fingerprint, depths, ids_S)
    paths = []
    for at in range(0, len(answers), SHARD_SEQUENCES):
        group = answers[at : at + SHARD_SEQUENCES]
        name = hashlib.blake2b(repr([a.ids for a in group]).encode(), digest_size=8).hexdigest()
        path = folder / f"{name}.safetensors"
        if not path.exists():
            parts = [_states(backbone, a, depths, ids_S, at + i) for i, a in enumerate(group) if a.tokens > 0]
            tensors = {n: torch.cat([getattr(p, n) for p in parts]) for n in Shard.__dataclass_fields__}
            partial = path.with_suffix(".tmp")
            save_file(tensors, partial)
            partial.replace(path)
        paths.append(path)
        progress(min(at + SHARD_SEQUENCES, len(answers)), len(answers))
    return paths


def in_halves(hidden_TD: Tensor) -> Tensor:
    """States in half precision. A row too large for it is scaled down as a whole: the norms that read it see no difference,
    and some models end with single values beyond 65504 (Gemma 3, for one)."""
    largest_T1 = hidden_TD.abs().amax(-1, keepdim=True)
    return (hidden_TD * (HALF_LIMIT / largest_T1.clamp_min(HALF_LIMIT))).half()


def read_shard(path: Path) -> Shard:
    """A shard; ValueError for a damaged one."""
    try:
        return Shard(**load_file(path))
    except Exception as error:  # what a damaged or foreign file makes the reader raise
        raise AdiError(f"the shard {path} is damaged ({error}); delete it to make it again.") from None


def read_shards(paths: Sequence[Path]) -> Iterator[Shard]:
    return (read_shard(path) for path in paths)


def _states(backbone: Backbone, answer: Answer, depths: Sequence[int], ids_S: Tensor, sequence: int) -> Shard:
    """All rows of one sequence that say an answer token: the last of the prompt up to the last but one."""
    cache, ids = backbone.new_cache(), answer.ids[:-1]
    rows = slice(answer.start - 1, len(ids))
    kept, hidden_TD, lo = [], None, 0
    for hi in (*depths, backbone.spec.layers):
        hidden_TD = backbone.forward([Rows(cache, 0, ids, hidden_TD)], lo, hi)[0].hidden_TD
        kept.append(hidden_TD[rows])
        lo = hi
    logs_NV = backbone.logits(kept.pop()).log_softmax(-1)
    outside_N = logs_NV.index_fill(1, ids_S.to(logs_NV.device), float("-inf")).logsumexp(-1)
    hidden_NED = in_halves(torch.stack(kept, 1))
    return Shard(
        hidden_NED=hidden_NED.cpu(),
        teacher_NS=logs_NV[:, ids_S].half().cpu(),
        tail_N=outside_N.clamp_min(-1e4).float().cpu(),
        token_N=logs_NV.argmax(-1).int().cpu(),
        sequence_N=torch.full((hidden_NED.shape[0],), sequence, dtype=torch.int32),
    )


def _same_settings(folder: Path, fingerprint: str, depths: Sequence[int], ids_S: Tensor) -> None:
    """Throw shards away that were made for another model, other depths or another shortlist."""
    key = json.dumps([fingerprint, list(depths), ids_S.tolist()])
    key = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    note = folder / "settings"
    if note.exists() and note.read_text() == key:
        return
    for stale in folder.glob("*.safetensors"):
        os.unlink(stale)  # noqa: PTH108
    note.write_text(key)
