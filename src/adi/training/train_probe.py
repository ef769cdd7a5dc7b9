"""Fit a probe: at every exit, when is the exit's token already full depth's?

The target is the oracle's benefit of going deeper, token by token, on the model's own text. Texts are split by prompt: some
choose how many hidden units and how long to learn, so that nothing is chosen on the rows that were learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from adi.artifact import Exits
from adi.decoding.teacher_forcing import KnownText, forced_pass, full_tokens
from adi.errors import UsageError
from adi.exits.probe import Net, Probe, head_features, state_features
from adi.model.backbone import Backbone
from adi.progress import Progress, no_progress
from adi.training.texts import answer_tokens
from adi.training.trainer import descend

CHOOSING = 5  # every fifth text chooses
LEAST_SPREAD = 1e-3
FEWEST = 10


@dataclass(frozen=True)
class ProbeOptions:
    """Numbers of hidden units to try (0: logistic regression), passes over the rows at most, rows of a step, learning rate."""

    hidden: tuple[int, ...] = (0, 32)
    epochs: int = 8
    rows: int = 256
    learning_rate: float = 5e-4
    decay: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Examples:
    """N rows at one depth: state ``[N, D]``, features of the head's output ``[N, 6]``, whether its token is full depth's, and
    whether the row belongs to a text that chooses."""

    state_ND: Tensor
    head_NF: Tensor
    right_N: Tensor
    choosing_N: Tensor


@dataclass(frozen=True)
class ProbeFit:
    """One network on the texts that choose: hidden units and passes taken, loss in nats against that of a constant."""

    kind: str
    depth: int
    hidden: int
    epochs: int
    loss: float
    constant_loss: float


def fit_probe(
    backbone: Backbone,
    exits: Exits,
    texts: Sequence[KnownText],
    options: ProbeOptions | None = None,
    progress: Progress = no_progress,
) -> tuple[Probe, dict[str, Any]]:
    """A probe for these exits from the model's own greedy answers, and a report of what was chosen.

    AdiError for fewer than ten texts: some must learn and some choose.
    """
    if len(texts) < FEWEST:
        raise UsageError(f"{len(texts)} texts are too few to fit a probe: give at least {FEWEST}, better some hundreds.")
    options = options or ProbeOptions()
    nets: dict[str, dict[int, Net]] = {"state": {}, "joint": {}}
    found: list[ProbeFit] = []
    examples = gather(backbone, exits, texts, progress)
    for depth, rows in examples.items():
        for kind, mine in nets.items():
            progress(len(found), len(nets) * len(examples), "training the probe")
            read = 0 if kind == "state" else rows.head_NF.shape[1]
            x_NF = torch.cat([rows.state_ND.float(), rows.head_NF], -1) if read else rows.state_ND.float()
            tried = [_fit(x_NF, read, rows, hidden, options) for hidden in options.hidden]
            net, epochs, loss = min(tried, key=lambda one: one[2])
            mine[depth] = net
            found.append(ProbeFit(kind, depth, len(net.out_H), epochs, loss, _constant_loss(rows)))
    choosing = sum(i % CHOOSING == 0 for i in range(len(texts)))
    networks = [asdict(one) for one in found]
    report = {"texts": len(texts), "choosing_texts": choosing, "tokens": answer_tokens(texts), "networks": networks}
    return Probe(nets["state"], nets["joint"]), report


@torch.no_grad()
def gather(
    backbone: Backbone, exits: Exits, texts: Sequence[KnownText], progress: Progress = no_progress
) -> dict[int, Examples]:
    """All rows that predict an answer token, by depth: one teacher-forced pass over each text, stopped at every exit."""
    read = exits.reader(backbone)
    parts: dict[int, list[tuple[Tensor, ...]]] = {depth: [] for depth in exits.depths}
    for i, seen in enumerate(forced_pass(backbone, texts, exits.depths)):
        token_N = full_tokens(backbone, seen.deep_ND)
        for depth in exits.depths:
            head = read(depth, seen.hidden[depth])
            right_N = head.tokens_T.cpu() == token_N
            state_ND = state_features(seen.hidden[depth]).half().cpu()
            parts[depth].append((state_ND, head_features(head).cpu(), right_N, torch.full_like(right_N, i % CHOOSING == 0)))
        progress(i + 1, len(texts), "reading exits")
    return {depth: Examples(*(torch.cat(column) for column in zip(*rows, strict=True))) for depth, rows in parts.items()}


def _fit(x_NF: Tensor, read: int, rows: Examples, hidden: int, options: ProbeOptions) -> tuple[Net, int, float]:
    """AdamW on the learning texts, from a logistic regression on the last ``read`` features; the network as it was after the
    pass that did best on the choosing ones."""
    learn, choose = ~rows.choosing_N, rows.choosing_N
    mean_F, spread_F = x_NF[learn].mean(0), x_NF[learn].std(0).clamp_min(LEAST_SPREAD)
    x_NF, y_N = (x_NF - mean_F) / spread_F, rows.right_N.float()
    generator = torch.Generator().manual_seed(options.seed)
    net = _fresh(x_NF[learn], y_N[learn], read, hidden, generator)
    weights = [tensor.requires_grad_() for tensor in net.tensors().values()]
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=options.decay)
    best, places = (net, 0, float("inf")), learn.nonzero()[:, 0]

    def loss_at(part: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(net.logit(x_NF[part]), y_N[part])

    for epoch in range(options.epochs + 1):
        if epoch:  # the first look is at a network that has not learned from the state
            for part in places[torch.randperm(len(places), generator=generator)].split(options.rows):
                descend(optimizer, [partial(loss_at, part)])
        with torch.no_grad():
            loss = float(loss_at(choose))
        if loss < best[2]:
            best = (Net(**{name: tensor.detach().clone() for name, tensor in net.tensors().items()}), epoch, loss)
    return _on_raw(best[0], mean_F, spread_F), best[1], best[2]


def _fresh(x_NF: Tensor, y_N: Tensor, read: int, hidden: int, generator: torch.Generator) -> Net:
    """It predicts what a logistic regression on the last ``read`` features does; without any, the share of right rows."""
    features = x_NF.shape[1]
    x_NS = torch.cat([x_NF[:, features - read :], torch.ones(len(x_NF), 1)], 1)
    weight_S = torch.zeros(read + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_S], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = binary_cross_entropy_with_logits(x_NS @ weight_S, y_N) + 1e-3 * weight_S.square().sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)
    skip_F = torch.cat([torch.zeros(features - read), weight_S.detach()[:read]])
    in_HF = torch.randn((hidden, features), generator=generator) / features**0.5
    return Net(skip_F, in_HF, torch.zeros(hidden), torch.zeros(hidden), weight_S.detach()[read:].clone())


def _on_raw(net: Net, mean_F: Tensor, spread_F: Tensor) -> Net:
    """The same network on features that were not standardised."""
    skip_F, in_HF = net.skip_F / spread_F, net.in_HF / spread_F
    return Net(skip_F, in_HF, net.inner_H - in_HF @ mean_F, net.out_H, net.bias - skip_F @ mean_F)


def _constant_loss(rows: Examples) -> float:
    share = rows.right_N[~rows.choosing_N].float().mean().clamp(1e-3, 1 - 1e-3)
    right = rows.right_N[rows.choosing_N].float().mean()
    return float(-(right * share.log() + (1 - right) * (1 - share).log()))
