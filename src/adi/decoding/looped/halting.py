"""A looped model that stops where its gate says so: each item of a puzzle as a whole, each place of a text by itself.

What has halted leaves the pass. A place of a text that has halted stays for later places as it was: from then on they attend to
keys and values made from its last state. An item may run from several
starts of which the first to halt wins ("Speed is Confidence", 2601.19085).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from adi.errors import UsageError
from adi.model.looped import LoopedForCausalLM


@dataclass(frozen=True)
class Halted:
    """``logits_BTV`` at the turn where each place halted, and that turn, from 1 on, ``turns_BT``; in a race ``start_B``, the
    start that won."""

    logits_BTV: Tensor
    turns_BT: Tensor
    start_B: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """When to halt: where the gate's chance passes ``threshold`` (None: never) and, ``verified``, the turn after it repeats the
    answer; after ``most`` turns at the latest. Of an item's ``starts`` the first to halt wins. ``backend`` says who
    runs it."""

    threshold: float | None
    most: int
    price: float | None = None
    verified: bool = False
    starts: int = 1
    seed: int = 0
    backend: str = "hf"

    def chance(self, model: LoopedForCausalLM, read_NTD: Tensor) -> Tensor:
        """The gate's, of items ``[N]`` (puzzles: by the mean of its logits) or of places ``[N, T]``; 0 where nothing halts."""
        if self.threshold is None:
            return torch.zeros(read_NTD.shape[: 2 if model.config.causal else 1])
        halt: Tensor = model.gate(read_NTD, self.price)
        return (halt if model.config.causal else halt.mean(-1)).sigmoid()


class Standing:
    """Which answers stand, turn after turn, for rows of which some leave on the way."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.fired: Tensor | None = None  # last turn
        self.before: Tensor

    def now(self, chance: Tensor, answers: Tensor) -> Tensor:
        """Of the rows of ``chance``; a row may have several ``answers``, along one axis more."""
        fires = chance > (1.0 if self.rule.threshold is None else self.rule.threshold)
        if not self.rule.verified:
            return fires
        stands = torch.zeros_like(fires)
        if self.fired is not None:
            stands = self.fired & (answers == self.before).reshape(*chance.shape, -1).all(-1)
        self.fired, self.before = fires, answers
        return stands

    def keep(self, left: Tensor) -> None:
        """Only these rows go on."""
        if self.fired is not None:
            self.fired, self.before = self.fired[left], self.before[left]


def _require_plain_turns(model: LoopedForCausalLM) -> None:
    if (between := model.config.turn_norm) == "final":
        raise UsageError(f"turn_norm is {between!r}: items are not solved by such a model; use adi.load and adi.generate.")


def require_halting(model: LoopedForCausalLM) -> None:
    """UsageError for a form of which no part can leave a pass."""
    _require_plain_turns(model)
    config = model.config
    if config.causal and (config.core_layers > 1 or config.states > 1 or config.prelude_layers or config.coda_layers):
        raise UsageError(
            "places halt one by one only in a causal model of one core block and neither prelude nor coda; this one has "
            f"core_layers={config.core_layers}, states={config.states}, prelude_layers={config.prelude_layers}, "
            f"coda_layers={config.coda_layers}: run all turns (halt=False)."
        )


@torch.no_grad()
def run_halting(
    model: LoopedForCausalLM, ids_BT: Tensor, rule: Rule, asked_BT: Tensor | None = None, noise_BTD: Tensor | None = None
) -> Halted:
    """Answers of a batch, each at the turn where it halts; what has halted costs nothing more.

    Of a race each ``rule.starts`` rows in a row are one item, and the results are one per item. ``asked_BT`` says which of an
    item's places must repeat their answers (all by default); ``noise_BTD`` is added to the first states.
    """
    asked_BT = torch.ones_like(ids_BT) if asked_BT is None else asked_BT
    if rule.threshold is None:
        return _all_turns(model, ids_BT, rule)
    require_halting(model)
    if model.config.causal:
        return _Places(model, ids_BT, rule).run()
    _, attention = inputs_of(model, ids_BT[:1])

    def turn(state: Tensor, given_NTD: Tensor) -> tuple[Tensor, ...]:
        state = model.model.turn(state, given_NTD, 0, **attention)
        read_NTD = model.model.read_out(state, 0, attention)
        return state, model.lm_head(read_NTD).float(), model.gate(read_NTD, rule.price).mean(-1)

    return items_until_halt(model, ids_BT, rule, asked_BT, noise_BTD, turn)


def inputs_of(model: LoopedForCausalLM, ids_BT: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What is fed into every turn, and what attention is given beside. UsageError where more lies between turns."""
    decoder = model.model
    _require_plain_turns(model)
    given_BTD = decoder.embed_tokens(ids_BT)
    places = torch.arange(ids_BT.shape[1])[None]
    if model.config.positions == "learned":
        given_BTD = given_BTD + decoder.embed_positions(places)
    attention: dict[str, Any] = {"position_embeddings": decoder.positions(given_BTD, places), "attention_mask": None}
    for i, block in enumerate(decoder.prelude):
        given_BTD = block(given_BTD, i, **attention)
    return given_BTD, attention


def _all_turns(model: LoopedForCausalLM, ids_BT: Tensor, rule: Rule) -> Halted:
    read, _, _ = model.model(input_ids=ids_BT, turns=rule.most)
    return Halted(model.lm_head(read[-1]).float(), torch.full_like(ids_BT, rule.most))


def items_until_halt(
    model: LoopedForCausalLM,
    ids_NT: Tensor,
    rule: Rule,
    asked_NT: Tensor,
    noise_NTD: Tensor | None,
    turn_of: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
) -> Halted:
    """Items of which all places halt together: those that have halted leave the batch, with all their starts. ``turn_of``
    takes states and inputs to states, logits and the gate's mean logit."""
    decoder, starts, standing = model.model, rule.starts, Standing(rule)
    given, _ = inputs_of(model, ids_NT)
    state, item = decoder.first_state(given), torch.arange(len(ids_NT) // starts)
    if noise_NTD is not None:
        state = state + noise_NTD
    logits = torch.zeros(len(item), ids_NT.shape[1], model.config.vocab_size)
    turns, start = torch.zeros(len(item), ids_NT.shape[1], dtype=torch.long), torch.zeros_like(item)
    for turn in range(1, rule.most + 1):
        state, found, halt = turn_of(state, given)
        chance = halt.sigmoid()
        stands = standing.now(chance, found.argmax(-1) * asked_NT if rule.verified else chance)
        ends_I = stands.view(-1, starts).any(1) | (turn == rule.most)
        if not bool(ends_I.any()):
            continue
        best = (chance + 2 * stands).view(-1, starts).argmax(1)  # the surest of those that halt now, or else of all
        row, at = torch.arange(len(item)) * starts + best, item[ends_I]
        logits[at], turns[at], start[at] = found[row[ends_I]], turn, best[ends_I]
        if bool(ends_I.all()):
            break
        left = (~ends_I).repeat_interleave(starts)
        state, given, asked_NT, item = state[left], given[left], asked_NT[left], item[~ends_I]
        standing.keep(left)
    return Halted(logits, turns, start)


class _Places:
    """The places of a batch of texts, each until it halts. Shapes: N rows that are open, H heads."""

    def __init__(self, model: LoopedForCausalLM, ids_BT: Tensor, rule: Rule) -> None:
        self.model, self.rule, self.shape, self.standing = model, rule, ids_BT.shape, Standing(rule)
        self.block: Any = model.model.turn.layers[0]
        self.heads: int = model.config.num_attention_heads
        self.size: int = model.config.hidden_size // self.heads
        given_BTD, attention = inputs_of(model, ids_BT)
        self.cos_TD, self.sin_TD = (part[0] for part in attention["position_embeddings"])
        B, T = ids_BT.shape
        self.keys, self.values = (torch.zeros(B, self.heads, T, self.size) for _ in range(2))
        self.sequence_N, self.place_N = (
            part.flatten() for part in torch.meshgrid(torch.arange(B), torch.arange(T), indexing="ij")
        )
        self.given_ND = given_BTD.flatten(0, 1)
        self.state_ND = model.model.first_state(given_BTD).flatten(0, 1)
        self.logits = torch.zeros(B, T, model.config.vocab_size)
        self.turns = torch.zeros(B, T, dtype=torch.long)

    def run(self) -> Halted:
        open_N = torch.ones(len(self.state_ND), dtype=torch.bool)
        for turn in range(1, self.rule.most + 1):
            entered_ND = self.model.model.turn.injected(self.state_ND, self.given_ND)
            queries_ND = self._write(self.block.input_layernorm(entered_ND))
            self.standing.keep(open_N)
            self._keep(open_N)  # those that halted last turn have left their keys and values: now they go
            entered_ND, queries_ND = entered_ND[open_N], queries_ND[open_N]
            hidden_ND = entered_ND + self._attended(queries_ND)
            hidden_ND = hidden_ND + self.block.mlp(self.block.post_attention_layernorm(hidden_ND))
            self.state_ND = self.model.model.turn.closed(hidden_ND)
            read_ND = self.model.model.read(self.state_ND)
            found_NV = self.model.lm_head(read_ND).float()
            self.logits[self.sequence_N, self.place_N] = found_NV
            self.turns[self.sequence_N, self.place_N] = turn
            open_N = ~self.standing.now(self.rule.chance(self.model, read_ND[:, None])[:, 0], found_NV.argmax(-1))
            if not bool(open_N.any()):
                break
        return Halted(self.logits, self.turns)

    def _write(self, normed_ND: Tensor) -> Tensor:
        """Keys and values of these rows into their places; their queries."""
        attention = self.block.self_attn
        cos, sin = self.cos_TD[self.place_N], self.sin_TD[self.place_N]
        heads = (-1, self.heads, self.size)
        queries: Tensor
        queries, keys = apply_rotary_pos_emb(
            attention.q_proj(normed_ND).view(heads), attention.k_proj(normed_ND).view(heads), cos, sin
        )
        self.keys[self.sequence_N, :, self.place_N] = keys
        self.values[self.sequence_N, :, self.place_N] = attention.v_proj(normed_ND).view(heads)
        return queries

    def _keep(self, open_N: Tensor) -> None:
        self.sequence_N, self.place_N, self.given_ND = self.sequence_N[open_N], self.place_N[open_N], self.given_ND[open_N]

    def _attended(self, queries_NHd: Tensor) -> Tensor:
        """Each row attends to its own text up to its place: rows of one text side by side, shorter ones padded."""
        sequences, counts = self.sequence_N.unique_consecutive(return_counts=True)
        at_N = torch.arange(len(self.sequence_N)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        of_N = torch.arange(len(sequences)).repeat_interleave(counts)
        padded = queries_NHd.new_zeros(len(sequences), self.heads, int(counts.max()), self.size)
        padded[of_N, :, at_N] = queries_NHd
        places = torch.zeros(len(sequences), padded.shape[2], dtype=torch.long)
        places[of_N, at_N] = self.place_N
        mask = torch.arange(self.shape[1]) <= places[:, None, :, None]
        found = F.scaled_dot_product_attention(padded, self.keys[sequences], self.values[sequences], attn_mask=mask)
        mixed_ND: Tensor = self.block.self_attn.o_proj(found[of_N, :, at_N].flatten(1))
        return mixed_ND
