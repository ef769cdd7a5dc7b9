"""``LoopedForCausalLM``: a transformers model whose core blocks run again and again (a turn), with a halting gate.

``state <- norm(core(inject(state, input)))``, ``turns`` times, between a prelude and a coda of ordinary blocks; one head reads
the state after any turn. With ``states=2`` it is the recursion of TRM (Jolicoeur-Martineau 2025): ``z <- core(z + y + x)``,
``inner_turns`` times, then ``y <- core(y + z)``. The injection by concatenation is Huginn's (Geiping et al. 2025), the norm
that closes a turn and the gate after each are Ouro's (Zhu et al. 2025). Without ``causal`` all places see each other: puzzles.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import torch
import torch.nn.functional as F  # noqa: N812
from msgspec import Meta, ValidationError, convert
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from adi.arguments import real
from adi.errors import UsageError
from adi.model.ouro import read_ouro
from adi.model.sparse import SPARSE, Router, SplLinear, make_sparse
from adi.schema import Natural, NonNegative, Positive

INJECTIONS = ("none", "add", "concat")
Pair = Annotated[list[float], Meta(min_length=2, max_length=2)]
GATE_BIAS = -3.0  # a gate that starts at one half stops most runs early for good (UT with ACT on Sudoku, 2604.21999)


class LoopedConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes and form of a looped model.

    ``core_layers`` blocks are one turn. ``causal`` False lets every place see all others. ``shifted_labels`` says whether a
    label is the next token (a language model) or the answer at its own place. Learned places are by ``place_features``, lists
    of one number per place, or one vector a place. ``positions`` is "rope" or "learned". With ``relation_bias`` each head
    learns a bias for each relation of two places: which of their features are the same (Shaw et al. 2018, for a grid). They
    start at the scale ``relation_range``: at 0 all places are attended alike, and a relation that is all is learned slowly.
    ``turn_norm`` closes a turn by a norm without weights, or, "final", begins each turn but the first with the final norm;
    ``sandwich_norms`` has a norm behind attention and MLP too (both are Ouro's). ``embedding_range`` is the scale at which
    embeddings start, ``place_range`` that of learned places (None: as ids do); None: ``initializer_range``. ``sparse``:
    "relu" in the MLPs, or ``SplLinear`` as their up projection ("mlp") and as queries, keys, values and outputs too ("all").
    ``gate_price`` gives the gate the logarithm of the price beside the state, as trained over ``price_range``; it halts where
    its chance passes ``halt_threshold``. ``task`` names what it was trained on. UsageError for a form that does not exist.
    """

    model_type = "adi_looped"

    def __init__(
        self,
        vocab_size: Positive = 16,
        hidden_size: Positive = 96,
        intermediate_size: Positive = 192,
        num_attention_heads: Positive = 4,
        prelude_layers: Natural = 0,
        core_layers: int = 1,
        coda_layers: Natural = 0,
        turns: int = 8,
        states: int = 1,
        inner_turns: int = 1,
        injection: str = "concat",
        turn_norm: bool | str = True,
        sandwich_norms: bool = False,
        gate_price: bool = False,
        price_range: Pair | None = None,
        halt_threshold: float = 0.5,
        task: str | None = None,
        causal: bool = True,
        shifted_labels: bool = True,
        positions: str = "rope",
        place_features: list[list[int]] | None = None,
        relation_bias: bool = False,
        relation_range: NonNegative = 0.0,
        embedding_range: NonNegative | None = None,
        place_range: NonNegative | None = None,
        sparse: str = "none",
        rope_theta: NonNegative = 10000.0,
        max_position_embeddings: Positive = 512,
        rms_norm_eps: NonNegative = 1e-6,
        initializer_range: NonNegative = 0.02,
        **kwargs: Any,
    ) -> None:
        _require_types(locals())
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_attention_heads = self.num_key_value_heads = num_attention_heads
        self.prelude_layers, self.core_layers, self.coda_layers = prelude_layers, core_layers, coda_layers
        self.turns, self.states, self.inner_turns = turns, states, inner_turns
        self.injection, self.turn_norm, self.sandwich_norms = injection, turn_norm, sandwich_norms
        self.causal, self.shifted_labels, self.positions = causal, shifted_labels, positions
        self.gate_price, self.price_range, self.halt_threshold = gate_price, price_range, halt_threshold
        self.place_features, self.relation_bias = place_features, relation_bias
        self.embedding_range, self.place_range = embedding_range, place_range
        self.rope_theta, self.max_position_embeddings, self.rms_norm_eps = rope_theta, max_position_embeddings, rms_norm_eps
        self.initializer_range, self.relation_range, self.task = initializer_range, relation_range, task
        self.attention_bias, self.attention_dropout, self.mlp_bias = False, 0.0, False
        self.sparse, self.hidden_act = sparse, "relu" if sparse == "relu" else "silu"
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
        self.num_hidden_layers = prelude_layers + self.turn_layers * turns + coda_layers
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self._require_form()

    def _require_form(self) -> None:
        """UsageError for values that do not go together."""
        injection, positions, states, turn_norm = self.injection, self.positions, self.states, self.turn_norm
        for name, value, known in (("injection", injection, INJECTIONS), ("sparse", self.sparse, SPARSE)):
            if value not in known:
                raise UsageError(f"{name} is {value!r}; choose one of {', '.join(known)}.")
        if positions not in ("rope", "learned"):
            raise UsageError(f"positions are {positions!r}; choose rope or learned.")
        if states not in (1, 2) or min(self.turns, self.core_layers, self.inner_turns) < 1:
            raise UsageError(
                f"states={states}, turns={self.turns}, core_layers={self.core_layers}: one or two states, others at least 1."
            )
        if turn_norm not in (True, False, "final") or (turn_norm == "final" and states > 1):
            raise UsageError(f"turn_norm is {turn_norm!r} with states={states}; choose true, false or, of one state, final.")
        if self.relation_bias and (self.causal or not self.place_features):
            raise UsageError(
                f"relation_bias={self.relation_bias} needs causal=False and place_features: what relates two places."
            )
        if self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}."
            )

    def judged_price(self, price: Any) -> float | None:
        """The price at which the gate is read, nats for a full pass: the geometric middle of its range where none is given,
        None for a gate without; UsageError for one that the gate does not know."""
        if not self.gate_price:
            if price is None:
                return None
            raise UsageError(
                f"price is {price!r}, but this model's gate knows no price; leave it out, or train one with highest_price."
            )
        if price is None:
            if self.price_range is None:
                raise UsageError(f"price is {price}, but this gate was trained over a range of prices; give price=0.05, say.")
            return float((self.price_range[0] * self.price_range[1]) ** 0.5)
        low, high = self.price_range or (1e-9, 100.0)
        allowed = f"from {low:g} to {high:g}, nats for a full pass: what the gate was trained over"
        return real("price", price, allowed, lambda p: low <= p <= high)

    @property
    def turn_layers(self) -> int:
        """Blocks that run in one turn, each with keys and values of its own."""
        return self.core_layers * (1 if self.states == 1 else self.inner_turns + 1)


def _require_types(given: dict[str, Any]) -> None:
    """UsageError names the parameter of ``LoopedConfig`` whose value is none of its kind."""
    for name, kind in get_type_hints(LoopedConfig.__init__, include_extras=True).items():
        try:
            convert(given.get(name), Any if name in ("kwargs", "return") else kind)
        except ValidationError as error:
            raise UsageError(f"{name} of a looped model is {given[name]!r}: {str(error).lower()}.") from None
    if (prices := given["price_range"]) is not None and not 0 < prices[0] <= prices[1]:
        raise UsageError(f"price_range of a looped model is {prices}: two prices above 0, the lower one first.")


class Block(nn.Module):
    """A Llama block whose place in the KV cache is given with each call."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, 0)
        self.self_attn.is_causal = config.causal
        self.mlp = LlamaMLP(config)
        make_sparse(self, config.sparse, config.hidden_size, config.intermediate_size)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.sandwich_norms:
            self.input_layernorm_2 = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_attention_layernorm_2 = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sandwich = config.sandwich_norms
        self.relations = _Relations(config) if config.relation_bias else None

    @property
    def mlp_tap(self) -> nn.Module:
        """What is given the MLP's activations; of a sparse one, its routing logits."""
        return getattr(self.mlp.up_proj, "speaks", self.mlp.down_proj)  # type: ignore[no-any-return]

    def forward(self, hidden_BTD: Tensor, slot: int, past_key_values: Any = None, **attention: Any) -> Tensor:
        cache = None if past_key_values is None else _Slot(past_key_values, slot)
        if self.relations is not None:
            attention["attention_mask"] = self.relations(attention["attention_mask"])
        mixed, _ = self.self_attn(self.input_layernorm(hidden_BTD), past_key_values=cache, **attention)
        hidden_BTD = hidden_BTD + (self.input_layernorm_2(mixed) if self.sandwich else mixed)
        out = self.mlp(self.post_attention_layernorm(hidden_BTD))
        return hidden_BTD + (self.post_attention_layernorm_2(out) if self.sandwich else out)  # type: ignore[no-any-return]


class _Relations(nn.Module):
    """A bias on attention per head and relation of two places; the bits of a relation say which features they share."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        features = torch.tensor(config.place_features)
        same_FTT = features[:, :, None] == features[:, None, :]
        self.bias = nn.Parameter(torch.zeros(config.num_attention_heads, 2 ** len(features)))
        self.of_TT: Tensor
        self.register_buffer("of_TT", (same_FTT * 2 ** torch.arange(len(features))[:, None, None]).sum(0), persistent=True)

    def forward(self, mask: Tensor | None) -> Tensor:
        """The mask of attention ``[1, H, T, T]`` with the bias in it."""
        bias_HTT = self.bias[:, self.of_TT][None]
        if mask is None or mask.dtype != torch.bool:
            return bias_HTT if mask is None else bias_HTT + mask
        return bias_HTT.masked_fill(~mask, torch.finfo(bias_HTT.dtype).min)


@dataclass(frozen=True)
class _Slot:
    """One layer of a cache, whatever layer the attention takes itself for: its weights run in many."""

    cache: Any
    slot: int

    def update(self, keys: Tensor, values: Tensor, _: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.cache.update(keys, values, self.slot, *args, **kwargs)
        return found


class Turn(nn.Module):
    """The core: one turn takes the state ``[B, T, states * D]`` and what the prelude gave, and returns the next state."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config) for _ in range(config.core_layers))
        if config.injection == "concat":
            self.inject = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    @property
    def mlp_tap(self) -> nn.Module:
        """That of its last block."""
        last: Any = self.layers[-1]
        return last.mlp_tap  # type: ignore[no-any-return]

    def forward(self, hidden_states: Tensor, given_BTD: Tensor, slot: int, **attention: Any) -> Tensor:
        if self.config.states == 1:
            return self._core(self.injected(hidden_states, given_BTD), slot, attention)
        y_BTD, z_BTD = hidden_states.chunk(2, -1)
        for _ in range(self.config.inner_turns):
            z_BTD = self._core(self.injected(z_BTD + y_BTD, given_BTD), slot, attention)
            slot += self.config.core_layers
        return torch.cat([self._core(y_BTD + z_BTD, slot, attention), z_BTD], -1)

    def injected(self, state_BTD: Tensor, given_BTD: Tensor) -> Tensor:
        """The state with the input put in: what the first block of a turn reads."""
        if self.config.injection == "concat":
            return self.inject(torch.cat([state_BTD, given_BTD], -1))  # type: ignore[no-any-return]
        return state_BTD + given_BTD if self.config.injection == "add" else state_BTD

    def _core(self, hidden_BTD: Tensor, slot: int, attention: dict[str, Any]) -> Tensor:
        for i, block in enumerate(self.layers):
            hidden_BTD = block(hidden_BTD, slot + i, **attention)
        return self.closed(hidden_BTD)

    def closed(self, hidden_BTD: Tensor) -> Tensor:
        """The norm without weights that ends a turn, so that no scale grows from turn to turn."""
        return F.rms_norm(hidden_BTD, hidden_BTD.shape[-1:]) if self.config.turn_norm is True else hidden_BTD


class PlaceEmbedding(nn.Module):
    """Learned places: the sum of one vector for each of a place's features (of a puzzle its row, column and box)."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        features = config.place_features or [list(range(config.max_position_embeddings))]
        self.tables = nn.ModuleList(nn.Embedding(max(feature) + 1, config.hidden_size) for feature in features)
        self.of_FT: Tensor
        self.register_buffer("of_FT", torch.tensor(features), persistent=True)

    def forward(self, places_BT: Tensor) -> Tensor:
        found = [table(of_T[places_BT]) for table, of_T in zip(self.tables, self.of_FT, strict=True)]
        return torch.stack(found).sum(0)


class LoopedPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    config_class = LoopedConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ("Block", "Turn")

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, _Stop):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, GATE_BIAS)
        if isinstance(module, Router):
            module.reset()
        if isinstance(module, SplLinear):
            module.reset(self.config.initializer_range)
        if isinstance(module, _Relations) and self.config.relation_range:
            nn.init.normal_(module.bias, std=self.config.relation_range)
        if isinstance(module, nn.Embedding) and self.config.embedding_range is not None:
            nn.init.normal_(module.weight, std=self.config.embedding_range)
        if isinstance(module, PlaceEmbedding) and self.config.place_range is not None:
            for weight in module.tables.parameters():
                nn.init.normal_(weight, std=self.config.place_range)


class LoopedModel(LoopedPreTrainedModel):
    """Embedding, prelude, turns, coda; without the head."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = PlaceEmbedding(config)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.prelude_layers))
        self.turn = Turn(config)
        self.coda = nn.ModuleList(Block(config) for _ in range(config.coda_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        turns: int | None = None,
        state: Tensor | None = None,
        read_turns: bool = False,
        **kwargs: Any,
    ) -> tuple[list[Tensor], Any, Tensor]:
        """States read after each turn, ``[B, T, D]`` through coda and final norm (where there is a coda only if ``read_turns``,
        else after the last); the KV cache; the last state itself.

        ``state`` enters the first turn in the place of ``first_state``: to go on from where a pass without cache ended.
        UsageError for ``read_turns`` of a model with a coda and a KV cache, which holds one coda's keys and values.
        """
        given_BTD = self.embed(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + given_BTD.shape[1], device=given_BTD.device)[None]
        if self.config.positions == "learned":
            given_BTD = given_BTD + self.embed_positions(position_ids)
        make_mask = create_causal_mask if self.config.causal else create_bidirectional_mask
        attention = {
            "attention_mask": make_mask(
                config=self.config,
                inputs_embeds=given_BTD,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **({"position_ids": position_ids} if self.config.causal else {}),
            ),
            "position_embeddings": self.positions(given_BTD, position_ids),
            "past_key_values": past_key_values,
        }
        for i, block in enumerate(self.prelude):
            given_BTD = block(given_BTD, i, **attention)
        read, wanted = [], self.config.turns if turns is None else turns
        normed = self.config.turn_norm == "final"
        begun, state = state is not None, self.first_state(given_BTD) if state is None else state
        slot, per_turn = self.config.prelude_layers, self.config.turn_layers
        if read_turns and self.config.coda_layers and past_key_values is not None:
            raise UsageError(
                f"output_turns=True runs the coda (coda_layers={self.config.coda_layers}) after each turn, and a KV cache "
                "holds it once; give use_cache=False."
            )
        for turn in range(wanted):
            entering = self.norm(state) if normed and (begun or turn) else state
            state = self.turn(entering, given_BTD, slot + turn * per_turn, **attention)
            if turn == wanted - 1 or read_turns or not self.config.coda_layers:
                read.append(self.read_out(state, slot + wanted * per_turn, attention))
        return read, past_key_values, state

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError(f"give either input_ids or inputs_embeds, not {0 if input_ids is None else 2} of the two.")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def positions(self, hidden_BTD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines; of angle nought everywhere where positions are learned."""
        rotary = position_ids if self.config.positions == "rope" else torch.zeros_like(position_ids)
        found: tuple[Tensor, Tensor] = self.rotary_emb(hidden_BTD, position_ids=rotary)
        return found

    def first_state(self, given_BTD: Tensor) -> Tensor:
        """What enters the first turn: nothing where the input is injected, else the input."""
        first = given_BTD if self.config.injection == "none" else torch.zeros_like(given_BTD)
        return first if self.config.states == 1 else torch.cat([first, torch.zeros_like(first)], -1)

    def read(self, state: Tensor) -> Tensor:
        """The answering half of a state through the final norm, for a model without a coda."""
        return self.norm(state.chunk(self.config.states, -1)[0])  # type: ignore[no-any-return]

    def read_out(self, state: Tensor, slot: int, attention: dict[str, Any]) -> Tensor:
        """The answering half of a state through the coda, whose place in the KV cache begins at ``slot``, and the norm."""
        hidden_BTD = state.chunk(self.config.states, -1)[0]
        for i, block in enumerate(self.coda):
            hidden_BTD = block(hidden_BTD, slot + i, **attention)
        return self.norm(hidden_BTD)  # type: ignore[no-any-return]


class _Stop(nn.Linear):
    """The last layer of a gate, which starts at ``GATE_BIAS``."""


class HaltingGate(nn.Module):
    """The logit of stopping after a turn, from the state that was read there; with ``gate_price`` also from the price."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.priced, self.config = config.gate_price, config
        self.hidden = nn.Linear(config.hidden_size + self.priced, config.hidden_size)
        self.stop = _Stop(config.hidden_size, 1)

    def forward(self, read_BTD: Tensor, price: float | Tensor | None = None) -> Tensor:
        if self.priced:
            price = self.config.judged_price(price) if price is None else price
            logs = torch.as_tensor(price, dtype=read_BTD.dtype).log().expand(read_BTD.shape[:-1])
            read_BTD = torch.cat([read_BTD, logs[..., None]], -1)
        return self.stop(F.silu(self.hidden(read_BTD)))[..., 0]  # type: ignore[no-any-return]


@dataclass
class LoopedOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """With ``turn_logits`` ``[R, B, T, V]``, ``halt_logits`` ``[R, B, T]`` and the last ``state`` ``[B, T, states * D]`` where
    all turns were asked for."""

    turn_logits: Tensor | None = None
    halt_logits: Tensor | None = None
    state: Tensor | None = None


class LoopedForCausalLM(LoopedPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A looped model with a head over the vocabulary and a halting gate.

    ``forward(..., turns=n)`` runs n turns instead of ``config.turns``; ``output_turns=True`` reads head and gate after each.
    The loss of ``labels`` is that of the last turn: training under a price is ``adi.training``'s.
    """

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        self.model = LoopedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gate = HaltingGate(config)
        self.post_init()

    @classmethod
    def from_ouro(cls, folder: str | os.PathLike[str]) -> LoopedForCausalLM:
        """The model of a checkpoint of Ouro's shape (see ``model.ouro``), in evaluation mode. FileError or ModelError."""
        found: LoopedForCausalLM = read_ouro(cls, folder)
        return found

    def get_decoder(self) -> LoopedModel:
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_turns: bool = False,
        price: float | Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LoopedOutput:
        read, cache, state = self.model(input_ids=input_ids, read_turns=output_turns, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(read[-1][:, kept])
        out = LoopedOutput(logits=logits, past_key_values=cache)
        if labels is not None:
            out.loss = self.losses(logits, labels).mean()
        if output_turns:
            every_RBTD = torch.stack(read)
            out.turn_logits = self.lm_head(every_RBTD)
            out.halt_logits, out.state = self.gate(every_RBTD.detach(), price), state
        return out

    def losses(self, logits: Tensor, labels_BT: Tensor) -> Tensor:
        """Cross entropy in nats, ``[..., N]``, of logits ``[..., B, T, V]`` where there is a label (-100: none)."""
        if self.config.shifted_labels:
            logits, labels_BT = logits[..., :-1, :], labels_BT[:, 1:]
        known = labels_BT != -100
        chosen = logits[..., known, :].log_softmax(-1)
        index = labels_BT[known].expand(chosen.shape[:-1])[..., None]
        return -chosen.gather(-1, index)[..., 0]


def register() -> None:
    """Make ``AutoModelForCausalLM`` know the model type; done on importing this."""
    AutoConfig.register(LoopedConfig.model_type, LoopedConfig, exist_ok=True)
    AutoModelForCausalLM.register(LoopedConfig, LoopedForCausalLM, exist_ok=True)


register()
