"""Looped models of others' shapes, written here with random weights: Ouro's, Huginn's, a router's, and HRM-Text's own class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import HrmTextConfig, HrmTextForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from adi.model.looped import Block, LoopedConfig

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "turns": 4}


class ShapeConfig(LoopedConfig):
    model_type = "shape"

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)


class Shape(PreTrainedModel):
    """A decoder whose blocks are called one after the other, each with the next layer of the KV cache."""

    config_class = ShapeConfig

    def __init__(self, config: LoopedConfig, **options: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = LlamaRMSNorm(config.hidden_size)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.build(config, **options)
        self.post_init()

    def build(self, config: LoopedConfig, **options: Any) -> None:
        raise NotImplementedError

    def recur(self, hidden_BTD: Tensor, position_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def run(self, block: Any, hidden_BTD: Tensor, rows: Any = slice(None)) -> Tensor:
        self.slot += 1
        mask = self.attention["attention_mask"]
        attention = (
            self.attention
            if isinstance(rows, slice)
            else {
                "position_embeddings": tuple(part[:, rows] for part in self.attention["position_embeddings"]),
                "attention_mask": None if mask is None else mask[..., rows, :][..., rows],
            }
        )
        return block(hidden_BTD, self.slot, **attention)  # type: ignore[no-any-return]

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, past_key_values: Any = None, use_cache: Any = None
    ) -> Any:
        self.ids, given = input_ids, self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(given.shape[1])[None]
        cache = {"past_key_values": past_key_values}
        mask = create_causal_mask(
            config=self.config, inputs_embeds=given, attention_mask=None, position_ids=position_ids, **cache
        )
        self.attention = {"attention_mask": mask, "position_embeddings": self.rotary_emb(given, position_ids), **cache}
        self.slot = -1
        return BaseModelOutputWithPast(last_hidden_state=self.norm(self.recur(given, position_ids)), **cache)


class Ouro(Shape):
    """A list of blocks that runs again and again, with a norm behind each turn."""

    def build(self, config: LoopedConfig, shared: bool = False, stops_at: int | None = None) -> None:
        """``shared``: all turns write the same layers of the KV cache. A text that begins with ``stops_at`` has a turn less."""
        self.layers = nn.ModuleList(Block(config) for _ in range(config.core_layers))
        self.shared, self.stops_at = shared, stops_at

    def recur(self, hidden_BTD: Tensor, position_ids: Tensor) -> Tensor:
        for turn in range(self.config.turns - (self.stops_at == int(self.ids[0, 0]))):
            self.slot = -1 if self.shared else self.slot
            for block in self.layers:
                hidden_BTD = self.run(block, hidden_BTD if turn == 0 or block is not self.layers[0] else self.norm(hidden_BTD))
        return hidden_BTD


class Huginn(Shape):
    """Prelude, a core that is given the prelude's output again in each turn and begins at ``start``, coda."""

    def build(self, config: LoopedConfig, start: str) -> None:
        self.start = start
        self.prelude, self.core, self.coda = (nn.ModuleList(Block(config) for _ in range(2)) for _ in range(3))
        self.adapter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def first(self, like: Tensor, position_ids: Tensor) -> Tensor:
        if self.start == "zeros":
            return torch.zeros_like(like)
        if self.start == "noise":
            return torch.randn_like(like)
        return torch.sin(position_ids[..., None] * torch.arange(1, like.shape[-1] + 1) * 7.3)  # the same for each position

    def recur(self, hidden_BTD: Tensor, position_ids: Tensor) -> Tensor:
        for block in self.prelude:
            hidden_BTD = self.run(block, hidden_BTD)
        given, hidden_BTD = hidden_BTD, self.first(hidden_BTD, position_ids)
        for _ in range(self.config.turns):
            hidden_BTD = self.adapter(torch.cat([hidden_BTD, given], -1))
            for block in self.core:
                hidden_BTD = self.run(block, hidden_BTD)
        for block in self.coda:
            hidden_BTD = self.run(block, hidden_BTD)
        return hidden_BTD


class Routed(Shape):
    """Mixture of recursions: a router sends half of the tokens through each further turn."""

    def build(self, config: LoopedConfig) -> None:
        self.layers = nn.ModuleList([Block(config)])
        self.router = nn.Linear(config.hidden_size, 1)

    def recur(self, hidden_BTD: Tensor, position_ids: Tensor) -> Tensor:
        hidden_BTD = self.run(self.layers[0], hidden_BTD)
        for _ in range(self.config.turns - 1):
            rows = self.router(hidden_BTD)[0, :, 0].topk((hidden_BTD.shape[1] + 1) // 2).indices.sort().values
            hidden_BTD = hidden_BTD.clone()
            hidden_BTD[:, rows] = self.run(self.layers[0], hidden_BTD[:, rows], rows)
        return hidden_BTD


class WithHead(PreTrainedModel):
    config_class = ShapeConfig

    def __init__(self, decoder: Shape) -> None:
        super().__init__(decoder.config)
        self.model, self.lm_head = decoder, nn.Linear(decoder.config.hidden_size, decoder.config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> Shape:
        return self.model

    def forward(self, input_ids: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, **kwargs).last_hidden_state))


def randomised(model: Any, scale: float = 0.3) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale)
    return model.eval()


def ouro(**options: Any) -> Any:
    return randomised(WithHead(Ouro(ShapeConfig(**SIZES, core_layers=2), **options)))


def huginn(start: str = "zeros") -> Any:
    return randomised(WithHead(Huginn(ShapeConfig(**SIZES), start=start)))


def routed() -> Any:
    return randomised(WithHead(Routed(ShapeConfig(**SIZES))))


def hrm_text(**sizes: Any) -> Any:
    """Two stacks that feed each other: z_L, z_H."""
    plain = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"head_dim": 8, "H_cycles": 2, "L_cycles": 3, "initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0}
    return randomised(HrmTextForCausalLM(HrmTextConfig(**{**plain, **more, **sizes})))
