"""Tiny looped models with gates, and items for them."""

from __future__ import annotations

import torch

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
