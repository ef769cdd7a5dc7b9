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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adi.drafters.network import Drafter, advance, first_state, fresh_drafter, predict
from adi.exits.heads import Shortlist
from adi.exits.signals import Prediction
from adi.model.backbone import ReadOut
from adi.training.categories import Categories, Tally
from adi.training.drafter_shards import DrafterShard, read_drafter_shard
from adi.training.train_heads import resume_state, save_state, schedule

PROMPT_SHARE = 0.3  # of positions in prompts, where the text is not the model's own, that an epoch learns from
LATER = 0.8  # weight of a step against the one before it
DISTANCE = 0.3  # weight of the distance from the true state
STEPS_SHOWN = 5


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
class Text:
    """Tracks made ready: embeddings ``[N, D]`` and true states ``[N, D]`` as the drafter sees them."""

    tracks: DrafterShard
    x_ND: Tensor
    state_ND: Tensor


@dataclass(frozen=True)
class Unrolled:
    """One step at R rows that began at positions ``start_R``: it read the tokens at ``at_R`` and says what follows them."""

    step: int
    start_R: Tensor
    at_R: Tensor
    state_RD: Tensor
    said: Prediction


Embed = Callable[[Sequence[int]], Tensor]


def read_text(path: Path, readout: ReadOut, embed: Embed) -> Text:
    """A shard with its embeddings, each token's looked up once."""
    tracks = read_drafter_shard(path)
    known, places = tracks.ids_N.unique(return_inverse=True)
    return Text(tracks, embed(known.tolist()).float()[places], first_state(readout, tracks.deep_ND))


def unroll(net: Drafter, readout: ReadOut, among: Shortlist, text: Text, starts: Tensor, steps: int) -> Iterator[Unrolled]:
    """``steps`` drafts in a row from each of these positions, as far as its sequence goes."""
    sequence = text.tracks.sequence_N
    starts = starts[starts > 0]
    starts = starts[sequence[starts - 1] == sequence[starts]]
    state_RD = text.state_ND[starts - 1]
    for step in range(1, steps + 1):
        at = starts + step - 1
        inside = at < len(sequence)
        inside &= sequence[at.clamp(max=len(sequence) - 1)] == sequence[starts]
        starts, at = starts[inside], at[inside]
        state_RD = advance(net, readout, text.x_ND[at], state_RD[inside])
        yield Unrolled(step, starts, at, state_RD, predict(net, among, state_RD))


@dataclass(frozen=True)
class Teacher:
    """What the full model says at the positions from ``first`` on: probabilities of the shortlist ``[R, S]`` and of the rest
    ``[R]``. Worked out once for a span, whose steps read it one position further each."""

    first: int
    inside_RS: Tensor
    rest_R: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, among: Shortlist, text: Text, first: int, stop: int) -> Teacher:
        """For the positions from ``first`` to ``stop``, as far as the text goes."""
        logits_RS = torch.nn.functional.linear(text.state_ND[first:stop], among.weight_SD, among.bias_S).float()
        inside_RS = (logits_RS - text.tracks.total_N[first:stop, None]).exp_()
        return cls(first, inside_RS, (1 - inside_RS.sum(-1)).clamp(min=1e-6))

    def at(self, at_R: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities at these positions."""
        return self.inside_RS[at_R - self.first], self.rest_R[at_R - self.first]


def loss_of(text: Text, teacher: Teacher, done: Unrolled) -> Tensor:
    """Cross entropy and distance of one step, a mean over its rows; later steps weigh less."""
    inside_RS, rest_R = teacher.at(done.at_R)
    assert done.said.tail_T is not None
    entropy_R = -(inside_RS * done.said.log_probs_TS).sum(-1) - rest_R * done.said.tail_T
    true_RD = text.state_ND[done.at_R]
    distance_R = (done.state_RD - true_RD).square().mean(-1) / true_RD.square().mean(-1)
    weight = LATER ** (done.step - 1)
    return weight * (entropy_R + DISTANCE * distance_R).sum() / max(1, len(entropy_R))  # a span may hold no start


def fit_drafter(
    readout: ReadOut,
    among: Shortlist,
    embed: Embed,
    shards: Sequence[Path],
    checkpoint: Path,
    options: DraftOptions,
    progress: Callable[[int, int, float], None],
    mlp: Mapping[str, Tensor] | None = None,
    begin: Drafter | None = None,
) -> Drafter:
    """Train a drafter on ``shards``, resuming from ``checkpoint`` if it is there; ``progress(shards done, of, loss)``.

    It starts from ``begin``, or else from a fresh one, in which ``mlp`` is the model's own (``hidden`` is then its own too).
    """
    generator = torch.Generator().manual_seed(options.seed)
    net = begin if begin is not None else fresh_drafter(readout, among.ids_S, options.hidden, generator, mlp)
    net = net.map(lambda weight: weight.clone())
    trained = {n: t.requires_grad_() for n, t in net.tensors().items() if n not in ("ids_S", "shift_D")}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    total = options.epochs * len(shards)
    for at in range(resume_state(checkpoint, list(trained.values()), optimizer), total):
        order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(options.seed + at // len(shards)))
        text = read_text(shards[int(order[at % len(shards)])], readout, embed)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(at / total)
        loss = _shard(net, readout, among, text, options, at, optimizer)
        save_state(checkpoint, at + 1, list(trained.values()), optimizer)
        progress(at + 1, total, loss)
    return net.map(lambda weight: weight.detach())


def _shard(
    net: Drafter, readout: ReadOut, among: Shortlist, text: Text, options: DraftOptions, at: int, optimizer: Any
) -> float:
    """Updates over the positions of a shard, in spans that keep neighbours together; the mean loss."""
    dice, losses = torch.Generator().manual_seed(options.seed + 7919 * at), []
    spans = torch.nonzero(taken(text.tracks, dice)).flatten().split(options.positions)
    for i in torch.randperm(len(spans), generator=dice).tolist():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bfloat16):
            teacher = Teacher.of(among, text, int(spans[i][0]), int(spans[i][-1]) + options.unrolled)
            steps = unroll(net, readout, among, text, spans[i], options.unrolled)
            loss = torch.stack([loss_of(text, teacher, done) for done in steps]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses) / max(1, len(losses))


def taken(tracks: DrafterShard, dice: torch.Generator) -> Tensor:
    """The positions, ``[N]``, to learn from this time: all answers', and of prompts a share that is drawn anew."""
    drawn_N = torch.rand(len(tracks.answer_N), generator=dice) < PROMPT_SHARE
    return (tracks.answer_N | drawn_N) & ~opening(tracks)


def opening(tracks: DrafterShard) -> Tensor:
    """The positions, ``[N]``, of what all sequences begin with alike (a chat template's first words): there is one thing to
    learn of them, and it would be learned once for every text."""
    sequences = tracks.sequence_N.unique_consecutive(return_counts=True)[1].tolist()
    parts = list(tracks.ids_N.split(sequences))
    shortest = min(map(len, parts))
    alike = torch.stack([part[:shortest] for part in parts]).eq(parts[0][:shortest]).all(0)
    shared = int(alike.int().cumprod(0).sum()) if len(parts) > 1 else 0
    return torch.cat([torch.arange(len(part)) < shared for part in parts])


@torch.no_grad()
def judge(
    net: Drafter,
    readout: ReadOut,
    among: Shortlist,
    embed: Embed,
    shards: Sequence[Path],
    kinds: Categories | None = None,
    seen: Callable[[DrafterShard], Tensor] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """How drafts fare on answers: agreement with the full model's greedy token at each step, those before it having agreed;
    accepted drafts in a row (of 5); both by category of prompt where ``kinds`` knows any; and acceptance by tenth of
    confidence. ``seen`` marks the positions, ``[N]``, of texts that training saw: they are left out."""
    tally, kinds = Tally(STEPS_SHOWN), kinds or Categories()
    bins = {place: [0, 0] for place in range(10)}
    for number, path in enumerate(shards):
        progress(number, len(shards))
        text = read_text(path, readout, embed)
        names, kind_N = kinds.numbered(text.tracks)
        alive = text.tracks.answer_N.clone() if seen is None else text.tracks.answer_N & ~seen(text.tracks)
        for done in unroll(net, readout, among, text, torch.arange(len(alive)), STEPS_SHOWN):
            logs, places = done.said.log_probs_TS.max(-1)
            live = alive[done.start_R]
            agreed = (among.ids_S[places] == text.tracks.token_N[done.at_R]) & live
            tally.add(names, kind_N[done.start_R[live]], done.step, agreed[live])
            for place, hit in zip((logs.exp()[live] * 10).clamp(0, 9).int().tolist(), agreed[live].tolist(), strict=True):
                bins[place][0] += hit
                bins[place][1] += 1
            alive = torch.zeros_like(alive)
            alive[done.start_R[agreed]] = True
    return {
        **tally.total(),
        **({"by_category": tally.by_category()} if kinds.known else {}),
        "acceptance": {str(place): hit / of for place, (hit, of) in bins.items() if of >= 20},
    }


def as_halves(net: Drafter) -> Drafter:
    """The drafter as it will be read back from a file."""
    return replace(net.map(lambda weight: weight.half().float()), ids_S=net.ids_S)
