"""The small models of the study: a looped one, and a plain stack of as many blocks with weights of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adi.measure.exposure.facts import VOCABULARY
from adi.measure.exposure.settings import Shape
from adi.model.looped import LoopedConfig, LoopedForCausalLM, Turn

WIDTH, HEADS, TURNS = 64, 4, 4


class Stack(nn.ModuleList):
    """Turns without shared weights: in the place of a looped model's turn, it runs the one whose turn it is."""

    def forward(self, state: Tensor, given_BTD: Tensor, slot: int, **attention: Any) -> Tensor:
        found: Tensor = self[slot](state, given_BTD, slot, **attention)
        return found


def network(shape: Shape, seed: int) -> LoopedForCausalLM:
    """An untrained model of this shape; its head is its embedding, transposed."""
    torch.manual_seed(seed)
    config = LoopedConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_attention_heads=HEADS,
        turns=TURNS,
        injection="none",
        shifted_labels=False,
        rope_theta=100.0,
        initializer_range=0.05,
        embedding_range=0.125,
    )
    model = LoopedForCausalLM(config)
    if shape == "plain":
        stack = Stack(Turn(config) for _ in range(TURNS))
        stack.apply(model._init_weights)
        model.model.turn = stack  # type: ignore[assignment]
    model.lm_head.weight = model.model.embed_tokens.weight
    return model
