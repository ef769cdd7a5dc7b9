"""Fit a drafter: steps in a row, each on its own state from the one before, towards the full model's distribution.

From every position of a text the network drafts ``unrolled`` tokens ahead: the first step reads the true deep state of the
position before, later ones what the drafter gave itself, and the tokens between are those of the text, which is what they
are whenever drafts are accepted (training on own states: HASS, Zhang et al. 2024; EAGLE-3, Li et al. 2025). The loss of a
step is the cross entropy with the full model's whole distribution over shortlist and tail, and a share of the distance
from the true state (EAGLE, Li et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adi.drafters.network import Drafter, advance, first_state, fresh_drafter, predict
from adi.exits.signals import Prediction
from adi.model.backbone import States
from adi.progress import Progress
from adi.training.shards import Shard, Teacher, read_shard
from adi.training.trainer import OptimizerOptions, Update, train

PROMPT_SHARE = 0.3  # of positions in prompts, where the text is not the model's own, that an epoch learns from
LATER = 0.8  # weight of a step against the one before it
DISTANCE = 0.3  # weight of the distance from the true state


@dataclass(frozen=True)
class DraftOptions:
    """``hidden`` units of the MLP, ``unrolled`` steps, ``positions`` of an update, ``epochs``, learning rate, seed;
    ``bfloat16``: products in it, the rest in float32."""

    hidden: int = 1536
    unrolled: int = 3
    positions: int = 192
    epochs: int = 3
    learning_rate: float = 1e-3
    seed: int = 0
    bfloat16: bool = False


@dataclass(frozen=True)
class DraftText:
    """A shard made ready: embeddings ``[N, D]`` and true states ``[N, D]`` as the drafter sees them."""

    shard: Shard
    x_ND: Tensor
    state_ND: Tensor


@dataclass(frozen=True)
class Unrolled:
    """One step at R rows that began at positions ``start_R``: it read the tokens at ``at_R`` and predicts what follows them."""

    step: int
    start_R: Tensor
    at_R: Tensor
    state_RD: Tensor
    draft: Prediction


Embed = Callable[[Sequence[int]], States]  # a backbone's


def draft_text(path: Path, teacher: Teacher, embed: Embed) -> DraftText:
    """A shard with its embeddings, each token's looked up once."""
    shard = read_shard(path)
    known, places = shard.ids_N.unique(return_inverse=True)
    x_ND = embed(known.tolist()).hidden_TD.cpu().float()[places]
    return DraftText(shard, x_ND, first_state(teacher.readout, shard.deep_ND.float()))


def unroll(net: Drafter, teacher: Teacher, text: DraftText, starts: Tensor, steps: int) -> Iterator[Unrolled]:
    """``steps`` drafts in a row from each of these positions, as far as its text goes."""
    number_N = text.shard.text_N
    starts = starts[starts > 0]
    starts = starts[number_N[starts - 1] == number_N[starts]]
    state_RD = text.state_ND[starts - 1]
    for step in range(1, steps + 1):
        at = starts + step - 1
        inside = at < len(number_N)
        inside &= number_N[at.clamp(max=len(number_N) - 1)] == number_N[starts]
        starts, at = starts[inside], at[inside]
        state_RD = advance(net, teacher.readout, text.x_ND[at], state_RD[inside])
        yield Unrolled(step, starts, at, state_RD, predict(net, teacher.among, state_RD))


@dataclass(frozen=True)
class SoftLabels:
    """The full model's probabilities at the positions from ``first`` on: of the shortlist ``[R, S]`` and of the rest ``[R]``.
    Worked out once for a span, whose steps read it one position further each."""

    first: int
    inside_RS: Tensor
    rest_R: Tensor

    @classmethod
    def of(cls, teacher: Teacher, text: DraftText, first: int, stop: int) -> SoftLabels:
        """For the positions from ``first`` to ``stop``, as far as the text goes."""
        logs_RS, tail_R = teacher.logs(text.shard.deep_ND[first:stop], text.shard.total_N[first:stop])
        return cls(first, logs_RS.exp_(), tail_R.exp_())

    def at(self, at_R: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities at these positions."""
        return self.inside_RS[at_R - self.first], self.rest_R[at_R - self.first]


def loss_of(text: DraftText, labels: SoftLabels, done: Unrolled) -> Tensor:
    """Cross entropy and distance of one step, a mean over its rows; later steps weigh less."""
    inside_RS, rest_R = labels.at(done.at_R)
    assert done.draft.tail_T is not None
    entropy_R = -(inside_RS * done.draft.log_probs_TS).sum(-1) - rest_R * done.draft.tail_T
    true_RD = text.state_ND[done.at_R]
    distance_R = (done.state_RD - true_RD).square().mean(-1) / true_RD.square().mean(-1)
    weight = LATER ** (done.step - 1)
    return weight * (entropy_R + DISTANCE * distance_R).sum() / max(1, len(entropy_R))  # a span may hold no start


def fit_drafter(
    teacher: Teacher,
    embed: Embed,
    shards: Sequence[Path],
    checkpoint: Path,
    options: DraftOptions,
    progress: Progress,
    mlp: Mapping[str, Tensor] | None = None,
    begin: Drafter | None = None,
) -> Drafter:
    """Train a drafter on ``shards``, going on from ``checkpoint`` if it is there.

    It starts from ``begin``, or else from a fresh one, in which ``mlp`` is the model's own (``hidden`` is then its own too).
    """
    if begin is None:
        dice = torch.Generator().manual_seed(options.seed)
        begin = fresh_drafter(teacher.readout, teacher.among.ids_S, options.hidden, dice, mlp)
    net = begin.map(lambda weight: weight.clone())
    trained = [t.requires_grad_() for n, t in net.tensors().items() if n not in ("ids_S", "shift_D")]

    def loss(text: DraftText, span: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bfloat16):
            labels = SoftLabels.of(teacher, text, int(span[0]), int(span[-1]) + options.unrolled)
            steps = unroll(net, teacher, text, span, options.unrolled)
            return torch.stack([loss_of(text, labels, done) for done in steps]).sum()

    def updates(path: Path, dice: torch.Generator) -> list[Update]:
        text = draft_text(path, teacher, embed)
        spans = taken(text.shard, dice).nonzero()[:, 0].split(options.positions)  # which keep neighbours together
        return [[partial(loss, text, spans[i])] for i in torch.randperm(len(spans), generator=dice).tolist() if len(spans[i])]

    how = OptimizerOptions(options.epochs, options.learning_rate, (0.9, 0.95), 1.0, options.seed)
    train(trained, shards, checkpoint, how, updates, progress, "training the drafter")
    return net.map(lambda weight: weight.detach())


def taken(shard: Shard, dice: torch.Generator) -> Tensor:
    """The positions, ``[N]``, to learn from this time: all answers', and of prompts a share that is drawn anew."""
    drawn_N = torch.rand(len(shard.answer_N), generator=dice) < PROMPT_SHARE
    return (shard.answer_N | drawn_N) & ~opening(shard)


def opening(shard: Shard) -> Tensor:
    """The positions, ``[N]``, of what all texts begin with alike (a chat template's first words): there is one thing to learn
    of them, and it would be learned once for every text."""
    parts = list(shard.ids_N.split(shard.lengths))
    shortest = min(map(len, parts))
    alike = torch.stack([part[:shortest] for part in parts]).eq(parts[0][:shortest]).all(0)
    shared = int(alike.int().cumprod(0).sum()) if len(parts) > 1 else 0
    return torch.cat([torch.arange(len(part)) < shared for part in parts])


def as_halves(net: Drafter) -> Drafter:
    """The drafter as it will be read back from a file."""
    return replace(net.map(lambda weight: weight.half().float()), ids_S=net.ids_S)
