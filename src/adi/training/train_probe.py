"""Fit a probe: at every exit, when is the exit's token already full depth's?

The target is the oracle's benefit of going deeper, token by token, on the model's own text. Texts are split by prompt: some
choose how many hidden units and how long to learn, so that nothing is chosen on the rows that were learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adi.artifact import Exits
from adi.errors import AdiError
from adi.exits.probe import Net, Probe, head_features, state_features
from adi.model.backbone import Backbone, Rows
from adi.training.answers import Answer

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
    """N rows at one depth: state ``[N, D]``, what the head says ``[N, 6]``, whether its token is full depth's, whether the row
    belongs to a text that chooses."""

    state_ND: Tensor
    said_NF: Tensor
    right_N: Tensor
    choosing_N: Tensor


@dataclass(frozen=True)
class Fitted:
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
    texts: Sequence[Answer],
    options: ProbeOptions | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Probe, dict[str, Any]]:
    """A probe for these exits from the model's own greedy answers, and a report of what was chosen.

    ValueError for fewer than ten texts: some must learn and some choose.
    """
    if len(texts) < FEWEST:
        raise AdiError(f"{len(texts)} texts are too few to fit a probe: give at least {FEWEST}, better some hundreds.")
    options = options or ProbeOptions()
    nets: dict[str, dict[int, Net]] = {"state": {}, "joint": {}}
    found: list[Fitted] = []
    examples = gather(backbone, exits, texts, progress)
    for depth, rows in examples.items():
        for kind, mine in nets.items():
            said = 0 if kind == "state" else rows.said_NF.shape[1]
            x_NF = torch.cat([rows.state_ND.float(), rows.said_NF], -1) if said else rows.state_ND.float()
            tried = [_fit(x_NF, said, rows, hidden, options) for hidden in options.hidden]
            net, epochs, loss = min(tried, key=lambda one: one[2])
            mine[depth] = net
            found.append(Fitted(kind, depth, len(net.out_H), epochs, loss, _constant_loss(rows)))
    choosing = sum(i % CHOOSING == 0 for i in range(len(texts)))
    tokens = sum(text.tokens for text in texts)
    report = {"texts": len(texts), "choosing_texts": choosing, "tokens": tokens, "networks": [asdict(one) for one in found]}
    return Probe(nets["state"], nets["joint"]), report


@torch.no_grad()
def gather(
    backbone: Backbone, exits: Exits, texts: Sequence[Answer], progress: Callable[[int, int], None]
) -> dict[int, Examples]:
    """All rows that say an answer token, by depth: one full pass over each text, stopped at every exit."""
    read, layers = exits.reader(backbone), backbone.spec.layers
    parts: dict[int, list[tuple[Tensor, ...]]] = {depth: [] for depth in exits.depths}
    for i, text in enumerate(texts):
        cache, ids, rows, lo = backbone.new_cache(), text.ids[:-1], slice(text.start - 1, len(text.ids) - 1), 0
        hidden_TD, seen = None, {}
        for hi in (*exits.depths, layers):
            hidden_TD = backbone.forward([Rows(cache, 0, ids, hidden_TD)], lo, hi)[0].hidden_TD
            seen[hi], lo = hidden_TD[rows], hi
        token_N = torch.tensor(backbone.greedy(seen.pop(layers)))
        cache.close()
        for depth, state_ND in seen.items():
            said = read(depth, state_ND)
            right_N = said.tokens_T.cpu() == token_N
            choosing_N = torch.full_like(right_N, i % CHOOSING == 0)
            parts[depth].append((state_features(state_ND).half().cpu(), head_features(said).cpu(), right_N, choosing_N))
        progress(i + 1, len(texts))
    return {depth: Examples(*(torch.cat(column) for column in zip(*rows, strict=True))) for depth, rows in parts.items()}


def _fit(x_NF: Tensor, said: int, rows: Examples, hidden: int, options: ProbeOptions) -> tuple[Net, int, float]:
    """AdamW on the learning texts, from a logistic regression on the last ``said`` features; the network as it was after the
    pass that did best on the choosing ones."""
    learn, choose = ~rows.choosing_N, rows.choosing_N
    mean_F, spread_F = x_NF[learn].mean(0), x_NF[learn].std(0).clamp_min(LEAST_SPREAD)
    x_NF, y_N = (x_NF - mean_F) / spread_F, rows.right_N.float()
    generator = torch.Generator().manual_seed(options.seed)
    net = _fresh(x_NF[learn], y_N[learn], said, hidden, generator)
    weights = [tensor.requires_grad_() for tensor in net.tensors().values()]
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=options.decay)
    best, places = (net, 0, float("inf")), learn.nonzero()[:, 0]
    for epoch in range(options.epochs + 1):
        if epoch:  # the first look is at a network that has not learned from the state
            for part in places[torch.randperm(len(places), generator=generator)].split(options.rows):
                optimizer.zero_grad(set_to_none=True)
                torch.nn.functional.binary_cross_entropy_with_logits(net.logit(x_NF[part]), y_N[part]).backward()
                optimizer.step()
        with torch.no_grad():
            loss = float(torch.nn.functional.binary_cross_entropy_with_logits(net.logit(x_NF[choose]), y_N[choose]))
        if loss < best[2]:
            best = (Net(**{name: tensor.detach().clone() for name, tensor in net.tensors().items()}), epoch, loss)
    return _on_raw(best[0], mean_F, spread_F), best[1], best[2]


def _fresh(x_NF: Tensor, y_N: Tensor, said: int, hidden: int, generator: torch.Generator) -> Net:
    """Says what a logistic regression on the last ``said`` features does; without any, the share of right rows everywhere."""
    features = x_NF.shape[1]
    x_NS = torch.cat([x_NF[:, features - said :], torch.ones(len(x_NF), 1)], 1)
    weight_S = torch.zeros(said + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_S], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x_NS @ weight_S, y_N) + 1e-3 * weight_S.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    skip_F = torch.cat([torch.zeros(features - said), weight_S.detach()[:said]])
    in_HF = torch.randn((hidden, features), generator=generator) / features**0.5
    return Net(skip_F, in_HF, torch.zeros(hidden), torch.zeros(hidden), weight_S.detach()[said:].clone())


def _on_raw(net: Net, mean_F: Tensor, spread_F: Tensor) -> Net:
    """The same network on features that were not standardised."""
    skip_F, in_HF = net.skip_F / spread_F, net.in_HF / spread_F
    return Net(skip_F, in_HF, net.inner_H - in_HF @ mean_F, net.out_H, net.bias - skip_F @ mean_F)


def _constant_loss(rows: Examples) -> float:
    share = rows.right_N[~rows.choosing_N].float().mean().clamp(1e-3, 1 - 1e-3)
    right = rows.right_N[rows.choosing_N].float().mean()
    return float(-(right * share.log() + (1 - right) * (1 - share).log()))
