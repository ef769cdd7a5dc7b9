"""Halting on compiled OpenVINO graphs: the same answers as ``run_halting`` on torch, up to rounding.

A turn runs for one item or for four at once, in a graph whose number of rows is fixed: that works no shapes out, and a few
rows take a twentieth of a millisecond. The graph of a turn ends where the next turn's keys, values and queries are made, so
that places which have just halted need no pass of their own to leave theirs.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from adi.decoding.looped.halting import Halted, Rule, Standing, inputs_of, items_until_halt, require_halting
from adi.errors import UsageError
from adi.model.hub import quiet_transformers
from adi.model.looped import LoopedForCausalLM

AT_ONCE = 4  # items of a graph: their rows stay in the cache, and waiting for the last of them costs little
STEP = 8  # places of texts are made a multiple of this, so that few graphs are compiled


class Fixed:
    """A torch module as a compiled graph for inputs of these shapes, over arrays of its own."""

    def __init__(self, core: Any, module: nn.Module, examples: tuple[Tensor, ...], lone: bool) -> None:
        import openvino as ov

        with torch.no_grad(), quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer points at every Python branch
            traced = torch.jit.trace(module.eval(), examples, check_trace=False)
            graph = ov.convert_model(traced, example_input=examples)
        graph.reshape({i: ov.PartialShape(list(example.shape)) for i, example in enumerate(examples)})
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(graph, "CPU", config | ({"INFERENCE_NUM_THREADS": "1"} if lone else {}))
        self._request = compiled.create_infer_request()
        self.inputs = [example.numpy().copy() for example in examples]
        self.outputs = [np.zeros(tuple(port.shape), np.float32) for port in compiled.outputs]
        for i, array in enumerate(self.inputs):
            self._request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))
        for i, array in enumerate(self.outputs):
            self._request.set_output_tensor(i, ov.Tensor(array, shared_memory=True))

    def run(self) -> None:
        self._request.infer(share_outputs=True)


class _AllTurns(nn.Module):
    """Ids ``[G, T]`` to the logits after so many turns."""

    def __init__(self, model: LoopedForCausalLM, turns: int) -> None:
        super().__init__()
        self.model, self.turns = model, turns

    def forward(self, ids_GT: Tensor) -> Tensor:
        decoder = self.model.model
        given_GTD, attention = inputs_of(self.model, ids_GT)
        state = decoder.first_state(given_GTD)
        for _ in range(self.turns):
            state = decoder.turn(state, given_GTD, 0, **attention)
        logits: Tensor = self.model.lm_head(decoder.read_out(state, 0, attention))
        return logits


class _ItemTurn(nn.Module):
    """One turn of whole items: states and inputs ``[G, T, D]`` to states, logits and the gate's mean logit."""

    def __init__(self, model: LoopedForCausalLM, length: int, price: float | None) -> None:
        super().__init__()
        self.model, self.price = model, price
        _, self.attention = inputs_of(model, torch.zeros(1, length, dtype=torch.long))

    def forward(self, state: Tensor, given_GTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.model.model.turn(state, given_GTD, 0, **self.attention)
        read_GTD = self.model.model.read_out(state, 0, self.attention)
        return state, self.model.lm_head(read_GTD), self.model.gate(read_GTD, self.price).mean(-1)


class _PlaceTurn(nn.Module):
    """One turn of N places in each of G texts, from attention to the next turn's queries, keys and values.

    A row is ``given | entered | query``: what the input adds to each turn, what has entered this one, and its query. Matrices
    that read the same are one, and the gate's last, of one output, is a sum: the plugin takes as long for any other.
    """

    def __init__(self, model: LoopedForCausalLM, length: int, price: float | None) -> None:
        super().__init__()
        self.model, self.length = model, length
        block: Any = model.model.turn.layers[0]
        self.block = block
        self.heads, self.width = model.config.num_attention_heads, model.config.hidden_size
        places = torch.arange(length)[None]
        self.cos_TD, self.sin_TD = (part[0] for part in model.model.positions(torch.zeros(1, length, self.width), places))
        self.mask_TT = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        attention, mlp, gate = block.self_attn, block.mlp, model.gate
        self.qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach()
        self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
        self.told = torch.cat([model.lm_head.weight, gate.hidden.weight[:, : self.width]]).detach()
        self.bias = gate.hidden.bias.detach()
        if gate.priced and price is not None:
            self.bias = self.bias + gate.hidden.weight[:, -1].detach() * float(np.log(price))
        self.concat = model.config.injection == "concat"
        if self.concat:
            self.of_state, self.of_given = (part.contiguous() for part in model.model.turn.inject.weight.detach().chunk(2, -1))

    def first(self) -> np.ndarray:
        """``given | entered | query | key | value`` of the first turn, for each id at each place: ``[V * T, 5 * D]``."""
        decoder, places_T = self.model.model, torch.arange(self.length)
        given_VTD = decoder.embed_tokens.weight[:, None].expand(-1, self.length, -1)
        if self.model.config.positions == "learned":
            given_VTD = given_VTD + decoder.embed_positions(places_T[None])
        state = decoder.first_state(given_VTD)
        given_VTD = F.linear(given_VTD, self.of_given) if self.concat else given_VTD
        rows = torch.cat([given_VTD, self._enter(state, given_VTD, places_T.expand(len(state), -1))], -1)
        return np.asarray(rows.flatten(0, 1).numpy())

    def forward(self, row_GNW: Tensor, place_GN: Tensor, kept_GTW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the gate's logit ``[G, N, V + 1]``; what enters the next turn with its query, key and value."""
        given_GND, entered_GND, queries = row_GNW.chunk(3, -1)
        queries, keys, values = (self._heads(part) for part in (queries, *kept_GTW.chunk(2, -1)))
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask_TT[place_GN][:, None])
        hidden_GND = entered_GND + self.block.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        gate, up = F.linear(self.block.post_attention_layernorm(hidden_GND), self.gate_up).chunk(2, -1)
        state = self.model.model.turn.closed(hidden_GND + self.block.mlp.down_proj(F.silu(gate) * up))
        told, stop = F.linear(self.model.model.read(state), self.told), self.model.gate.stop
        V = self.model.config.vocab_size
        halt = (F.silu(told[..., V:] + self.bias) * stop.weight[0].detach()).sum(-1, keepdim=True) + stop.bias.detach()
        return torch.cat([told[..., :V], halt], -1), self._enter(state, given_GND, place_GN)

    def _heads(self, part_GND: Tensor) -> Tensor:
        return torch.unflatten(part_GND, -1, (self.heads, -1)).transpose(1, 2)

    def _enter(self, state: Tensor, given_GND: Tensor, place_GN: Tensor) -> Tensor:
        linear = self.concat
        entered = F.linear(state, self.of_state) + given_GND if linear else self.model.model.turn.injected(state, given_GND)
        queries, keys, values = F.linear(self.block.input_layernorm(entered), self.qkv).chunk(3, -1)
        angles = self.cos_TD[place_GN], self.sin_TD[place_GN]
        turned = apply_rotary_pos_emb(self._heads(queries), self._heads(keys), *angles)
        return torch.cat([entered, *(part.transpose(1, 2).flatten(2) for part in turned), values], -1)


class Compiled:
    """A model's graphs, each compiled when it is first wanted. One run at a time."""

    def __init__(self, model: LoopedForCausalLM) -> None:
        import openvino as ov

        self._model, self._core, self._lock = model, ov.Core(), threading.RLock()
        self._weights = list(model.parameters())
        self._versions = self._now()
        self._graphs: dict[tuple[Any, ...], Fixed] = {}
        self._firsts: dict[tuple[Any, ...], tuple[_PlaceTurn, np.ndarray]] = {}

    def _now(self) -> list[int]:
        return [weight._version for weight in self._weights]

    def outdated(self) -> bool:
        """Whether weights were written to since."""
        return self._now() != self._versions

    @torch.no_grad()
    def run(self, ids_BT: Tensor, rule: Rule, asked_BT: Tensor, noise_BTD: Tensor | None) -> Halted:
        """As ``run_halting``."""
        require_halting(self._model)
        with self._lock:
            if rule.threshold is None:
                return self._all_turns(ids_BT, rule)
            if self._model.config.causal:
                if self._model.config.sparse != "none":
                    raise UsageError(
                        f"a looped model with sparse={self._model.config.sparse!r} halts place by place on backend 'hf' alone."
                    )
                return self._places(ids_BT.numpy(), rule)
            return items_until_halt(self._model, ids_BT, rule, asked_BT, noise_BTD, self._item_turn(ids_BT, rule))

    def _graph(self, key: tuple[Any, ...], make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Fixed:
        """The graph of this key for inputs of these shapes; inputs of two axes are ids or places."""
        if (found := self._graphs.get((*key, *shapes))) is None:
            examples = tuple(torch.zeros(shape, dtype=torch.int32 if len(shape) == 2 else torch.float32) for shape in shapes)
            found = self._graphs[*key, *shapes] = Fixed(self._core, make(), examples, lone=shapes[0][0] == 1)
        return found

    def _all_turns(self, ids_BT: Tensor, rule: Rule) -> Halted:
        size, length = 1 if len(ids_BT) == 1 else AT_ONCE, ids_BT.shape[1]
        graph = self._graph(("all turns", rule.most), lambda: _AllTurns(self._model, rule.most), (size, length))
        found = []
        for part_GT in ids_BT.split(size):
            graph.inputs[0][: len(part_GT)] = part_GT
            graph.run()
            found.append(torch.from_numpy(graph.outputs[0][: len(part_GT)].copy()))
        return Halted(torch.cat(found), torch.full_like(ids_BT, rule.most))

    def _item_turn(self, ids_BT: Tensor, rule: Rule) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        config, length = self._model.config, ids_BT.shape[1]
        size = 1 if len(ids_BT) == 1 else AT_ONCE
        shapes = ((size, length, width * config.hidden_size) for width in (config.states, 1))
        graph = self._graph(("items", rule.price), lambda: _ItemTurn(self._model, length, rule.price), *shapes)

        def part(*rows: Tensor) -> list[Tensor]:
            for array, some in zip(graph.inputs, rows, strict=True):
                array[: len(some)] = some.numpy()
            graph.run()
            return [torch.from_numpy(array[: len(rows[0])].copy()) for array in graph.outputs]

        def turn(state: Tensor, given_NTD: Tensor) -> tuple[Tensor, ...]:
            if len(state) <= size:
                return tuple(part(state, given_NTD))
            found = [part(*rows) for rows in zip(state.split(size), given_NTD.split(size), strict=True)]
            return tuple(map(torch.cat, zip(*found, strict=True)))

        return turn

    def _place_turn(self, length: int, price: float | None) -> tuple[_PlaceTurn, np.ndarray]:
        if (length, price) not in self._firsts:
            module = _PlaceTurn(self._model, length, price)
            self._firsts[length, price] = module, module.first()
        return self._firsts[length, price]

    def _places(self, ids_BT: np.ndarray, rule: Rule) -> Halted:
        """Places of texts, each until it halts. A place's number is text x length + place; N of them are open."""
        (B, T), D, V = ids_BT.shape, self._model.config.hidden_size, self._model.config.vocab_size
        length = -(-T // STEP) * STEP
        module, first = self._place_turn(length, rule.price)
        open_N = (np.arange(B)[:, None] * length + np.arange(T)).ravel()
        entering = first[(ids_BT * length + np.arange(T)).ravel()]
        rows, kept = entering[:, : 3 * D], np.zeros((B * length, 2 * D), np.float32)
        kept[open_N] = entering[:, 3 * D :]
        logits, turns = np.zeros((B * length, V), np.float32), np.zeros(B * length, np.int64)
        stands = _Stands(rule)
        for turn in range(1, rule.most + 1):
            told, entering = (np.empty((len(open_N), width), np.float32) for width in (V + 1, 4 * D))
            for chosen, texts, slots, (size, count) in _groups(open_N, B, length):
                shapes = ((size, count, 3 * D), (size, count), (size, length, 2 * D))
                graph = self._graph(("places", rule.price), lambda: module, *shapes)
                graph.inputs[0].reshape(size * count, -1)[slots] = rows[chosen]
                graph.inputs[1].reshape(-1)[slots] = open_N[chosen] % length
                graph.inputs[2][: len(texts)] = kept.reshape(B, length, -1)[texts]
                graph.run()
                told[chosen], entering[chosen] = (array.reshape(size * count, -1)[slots] for array in graph.outputs)
            logits[open_N], turns[open_N], kept[open_N] = told[:, :-1], turn, entering[:, 2 * D :]
            left = np.flatnonzero(~stands.now(told))
            open_N, rows = open_N[left], np.concatenate([rows[left, :D], entering[left, : 2 * D]], 1)
            if not len(open_N):
                break
        logits_BTV, turns_BT1 = (array.reshape(B, length, -1)[:, :T].copy() for array in (logits, turns))
        return Halted(torch.from_numpy(logits_BTV), torch.from_numpy(turns_BT1[..., 0]))


class _Stands:
    """Which answers stand, turn after turn; ``least`` is the gate's logit above which one halts."""

    def __init__(self, rule: Rule) -> None:
        assert rule.threshold is not None
        with np.errstate(divide="ignore"):
            self.least = float(np.log(rule.threshold) - np.log1p(-np.float64(rule.threshold)))
        self._verified = Standing(rule) if rule.verified else None

    def now(self, told_NV: np.ndarray) -> np.ndarray:
        """By logits and the gate's ``[N, V + 1]``; those that do not stand are asked again."""
        if self._verified is None:
            return np.asarray(told_NV[:, -1] > self.least)
        told = torch.from_numpy(told_NV)
        found_N = self._verified.now(told[:, -1].sigmoid(), told[:, :-1].argmax(-1))
        self._verified.keep(~found_N)
        return found_N.numpy()


def _groups(open_N: np.ndarray, texts: int, length: int) -> Iterator[tuple[Any, Any, Any, tuple[int, int]]]:
    """Which open places go through a graph together, those of so many texts; these texts; their places in its inputs; and its
    sizes. Texts of which as many are open go together."""
    if texts == 1:
        every = slice(0, len(open_N))
        yield every, [0], every, (1, _evened(len(open_N)))
        return
    text_M, start_M, count_M = np.unique(open_N // length, return_index=True, return_counts=True)
    order_M = np.argsort(-count_M, kind="stable")
    for group in (order_M[i : i + AT_ONCE] for i in range(0, len(order_M), AT_ONCE)):
        count = _evened(int(count_M[group[0]]))
        chosen = np.concatenate([np.arange(start_M[i], start_M[i] + count_M[i]) for i in group])
        slots = np.concatenate([at * count + np.arange(count_M[i]) for at, i in enumerate(group)])
        yield chosen, text_M[group], slots, (AT_ONCE, count)


def _evened(rows: int) -> int:
    """4, a multiple of 8, or of many a multiple of about a fifth, so that few graphs are compiled."""
    step = max(8, 1 << max(0, rows.bit_length() - 3))
    return 4 if rows <= 4 else -(-rows // step) * step


def compiled(model: LoopedForCausalLM) -> Compiled:
    """The graphs of this model, kept with it until its weights change."""
    found: Compiled | None = model.__dict__.get("_adi_compiled")
    if found is None or found.outdated():
        found = model.__dict__["_adi_compiled"] = Compiled(model)
    return found
