"""Tiny looped models with gates, and items for them."""

from __future__ import annotations

import torch

from adi.decoding.frontier import Frontier
from adi.model.looped import LoopedConfig, LoopedForCausalLM
from adi.tasks.products import GROUPS


def gated(causal: bool, seed: int = 0, **form: object) -> LoopedForCausalLM:
    """A tiny model whose gate halts at every turn about as often."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 6}
    model = LoopedForCausalLM(LoopedConfig(**{**sizes, "causal": causal, **form})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
        model.gate.stop.bias.zero_()
    return model


def ids(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(GROUPS["S3"].batch(count, length, seed).ids_BT)


def in_random_order(frontier: Frontier, begun: tuple[int, ...], orders: list[tuple[str, int]]) -> list[int]:
    """Appends ``begun``, then does what the orders say: "a" appends ids 0 to n - 1, "r" rolls back n, anything else lets n
    blocks catch up; in the end one more id is appended, since a frontier keeps no states from before its newest pass to full
    depth, and all do. The text that this must have made."""
    text = list(begun)
    frontier.append(begun)
    for what, n in orders:
        if what == "a":
            text += range(n)
            frontier.append(tuple(range(n)))
        elif what == "r" and len(text) > n:
            del text[-n:]
            frontier.rollback(len(text))
        else:
            frontier.advance(min(n, frontier.backbone.spec.layers))
    text.append(1)
    frontier.append((1,))
    frontier.advance(frontier.backbone.spec.layers)
    return text
