"""Shards: texts on disk with the hidden states that heads and drafters learn from.

They come from generation, where the states fall off as the text grows, or from one teacher-forced pass over known texts. What
the full model predicts at a position follows from its last state, so no logits are kept, only the logarithm of their total.
Shards are written one by one, whole or not at all; a stopped run goes on with the first that is missing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adi.decoding.teacher_forcing import KnownText, forced_pass
from adi.drafters.network import first_state
from adi.errors import FileError
from adi.exits.heads import Shortlist
from adi.files import require_readable, whole_file
from adi.model.backbone import Backbone, ReadOut
from adi.progress import Progress, no_progress

FORMAT = 3
SHARD_TEXTS = 32
HEAD_ROWS = 128
HALF_LIMIT = 6e4
LEAST_TAIL = 1e-6


@dataclass(frozen=True)
class Shard:
    """Texts end to end, N positions in all: token ids ``[N]``, number of the text ``[N]``, whether the row predicts a token of
    an answer ``[N]``; the full model's last states ``[N, D]``, ``logsumexp`` of its logits ``[N]`` and its greedy token
    ``[N]``; states at E exit depths ``[N, E, D]``, E being 0 where only a drafter learns."""

    ids_N: Tensor
    text_N: Tensor
    answer_N: Tensor
    deep_ND: Tensor
    total_N: Tensor
    token_N: Tensor
    hidden_NED: Tensor

    def rows(self, which: Tensor) -> Shard:
        """These positions alone."""
        return Shard(*(getattr(self, f.name)[which] for f in fields(self)))

    @property
    def lengths(self) -> list[int]:
        """Positions of each text."""
        return [int(count) for count in self.text_N.unique_consecutive(return_counts=True)[1]]

    @property
    def texts(self) -> list[KnownText]:
        """The texts themselves."""
        parts = zip(self.ids_N.split(self.lengths), self.answer_N.split(self.lengths), strict=True)
        return [KnownText(tuple(ids.tolist()), int(answer.int().argmax())) for ids, answer in parts]


def texts_in(paths: Iterable[Path]) -> list[KnownText]:
    """All texts of these shards."""
    return [text for path in paths for text in read_shard(path).texts]


def in_halves(hidden_TD: Tensor) -> Tensor:
    """States in half precision. A row too large for it is scaled down as a whole: the norms that read it see no difference,
    and some models end with single values beyond 65504 (Gemma 3, for one)."""
    largest_T1 = hidden_TD.abs().amax(-1, keepdim=True)
    return (hidden_TD * (HALF_LIMIT / largest_T1.clamp_min(HALF_LIMIT))).half()


def write_shard(
    path: Path, backbone: Backbone, texts: Sequence[KnownText], deep: Sequence[Tensor], hidden: Sequence[Tensor] = ()
) -> None:
    """Texts with all of their last states, ``[T, D]`` each, and those at exit depths, ``[T, E, D]``, in half precision."""
    deep_ND = in_halves(torch.cat(list(deep)))
    hidden_NED = in_halves(torch.cat(list(hidden))) if hidden else torch.zeros((len(deep_ND), 0, deep_ND.shape[1])).half()
    logits = (backbone.logits(rows_RD.float()) for rows_RD in deep_ND.split(HEAD_ROWS))
    totals, tokens = zip(*((logits_RV.logsumexp(-1), logits_RV.argmax(-1)) for logits_RV in logits), strict=True)
    columns = {
        "ids_N": torch.tensor([token for text in texts for token in text.ids], dtype=torch.int32),
        "text_N": torch.tensor([n for n, text in enumerate(texts) for _ in text.ids], dtype=torch.int32),
        "answer_N": torch.cat([torch.arange(len(text.ids)) >= text.first for text in texts]),
        "deep_ND": deep_ND.cpu(),
        "total_N": torch.cat(totals).float().cpu(),
        "token_N": torch.cat(tokens).int().cpu(),
        "hidden_NED": hidden_NED.cpu(),
    }
    with whole_file(path) as fresh:
        save_file(columns, fresh)


def read_shard(path: Path) -> Shard:
    """A shard; FileError for a damaged one."""
    require_readable(path)
    try:
        return Shard(**load_file(path))
    except Exception as error:  # what a damaged or foreign file makes the reader raise
        raise FileError(f"the shard {path} is damaged ({error}); delete it to make it again.") from None


def write_forced_shards(
    backbone: Backbone,
    texts: Sequence[KnownText],
    folder: Path,
    depths: Sequence[int] = (),
    progress: Progress = no_progress,
    what: str = "reading states",
) -> list[Path]:
    """Shards of known texts by one teacher-forced pass, ``SHARD_TEXTS`` in each; those already there are kept, those made of
    other texts, of another model or for other depths are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for at in range(0, len(texts), SHARD_TEXTS):
        group = [KnownText(text.ids) for text in texts[at : at + SHARD_TEXTS]]  # all rows, those of the prompt too
        key = repr([FORMAT, backbone.spec.fingerprint, backbone.spec.numbers, tuple(depths), texts[at : at + SHARD_TEXTS]])
        paths.append(folder / f"{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.safetensors")
        if not paths[-1].exists():
            deep, hidden = [], []
            for n, seen in enumerate(forced_pass(backbone, group, depths)):
                deep.append(seen.deep_ND)
                hidden += [torch.stack([seen.hidden[depth] for depth in depths], 1)] if depths else []
                progress(at + n, len(texts), what)
            write_shard(paths[-1], backbone, texts[at : at + SHARD_TEXTS], deep, hidden)
        progress(at + len(group), len(texts), what)
    for stale in {*folder.glob("*.safetensors")} - {*paths}:
        stale.unlink()
    return paths


def choose_shortlist(shards: Sequence[Path], vocabulary: int, size: int) -> Tensor:
    """The ``size`` tokens that the full model predicts most often in the answers, ascending; of those as frequent, the lowest
    ids (in byte-pair vocabularies early merges, which are the frequent ones)."""
    counts_V = torch.zeros(vocabulary, dtype=torch.long)
    for shard in map(read_shard, shards):
        counts_V += torch.bincount(shard.token_N[shard.answer_N], minlength=vocabulary)
    return counts_V.argsort(descending=True, stable=True)[:size].sort().values


@dataclass(frozen=True)
class Teacher:
    """The full model's distribution over a shortlist and the tail, from its last states. ``soft_cap`` bends its logits, those
    of the read-out times ``gain``, in the families that have one; it is None in others."""

    readout: ReadOut
    among: Shortlist
    gain: float = 1.0
    soft_cap: float | None = None

    @torch.no_grad()
    def logs(self, deep_ND: Tensor, total_N: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the shortlist ``[N, S]`` and of everything else ``[N]``."""
        logits_NS = self.logits(deep_ND)
        if self.soft_cap is not None:
            logits_NS = self.soft_cap * (self.gain * logits_NS / self.soft_cap).tanh()
        logs_NS = logits_NS - total_N[:, None]
        return logs_NS, (1 - logs_NS.exp().sum(-1)).clamp_min(LEAST_TAIL).log()

    def logits(self, deep_ND: Tensor) -> Tensor:
        """The shortlist's logits as the read-out gives them, ``[N, S]``."""
        state_ND = first_state(self.readout, deep_ND.float())
        return torch.nn.functional.linear(state_ND, self.among.weight_SD, self.among.bias_S).float()

    def fitted(self, deep_ND: Tensor, actual_NS: Tensor) -> Teacher:
        """With the soft cap, if there is one, that gives these logits at these states: small logits tell the gain, the largest
        the cap."""
        plain_NS = self.logits(deep_ND)
        small = plain_NS.abs() < 0.03 * plain_NS.abs().max()
        gain = float((plain_NS * actual_NS)[small].sum() / plain_NS[small].square().sum().clamp_min(1e-9))
        place = int(plain_NS.argmax())
        cap = soft_cap_of(gain * float(plain_NS.flatten()[place]), float(actual_NS.flatten()[place]))
        return self if cap is None else replace(self, gain=gain, soft_cap=cap)


def soft_cap_of(plain: float, actual: float) -> float | None:
    """The ``c`` with ``c * tanh(plain / c) == actual``, None where a logit is as the head's matrix gives it."""
    if not 0 < actual < 0.99 * plain:
        return None
    low, high = actual, actual * 100
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.tanh(plain / middle) < actual else (low, middle)
    return high
