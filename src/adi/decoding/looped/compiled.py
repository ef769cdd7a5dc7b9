"""Halting on compiled OpenVINO graphs: the same answers as ``run_halting`` on torch, up to rounding.

Each thread runs one item or text at a time, in graphs whose number of rows is fixed: that works no shapes out, waits for no
other thread between two nodes, and a few rows take a twenty-fifth of a millisecond. So an item's bits are the same alone and
beside others. The graph of a turn ends where the next turn's keys, values and queries are made, so that places which have just
halted need no pass of their own to leave theirs.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from adi.decoding.looped.halting import Halted, Rule, inputs_of, items_until_halt, require_halting
from adi.errors import UsageError
from adi.model.hub import quiet_transformers
from adi.model.looped import LoopedForCausalLM

STEP = 8  # places of texts are made a multiple of this, so that few graphs are compiled


def _converted(module: nn.Module, examples: tuple[Tensor, ...]) -> Any:
    """A torch module as a graph for inputs of these shapes."""
    import openvino as ov

    with torch.no_grad(), quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer points at every Python branch
        traced = torch.jit.trace(module.eval(), examples, check_trace=False)
        graph = ov.convert_model(traced, example_input=examples)
    graph.reshape({i: ov.PartialShape(list(example.shape)) for i, example in enumerate(examples)})
    return graph


class Bound:
    """A graph compiled over these arrays, for one thread: two threads' streams of one compiled graph are each slower."""

    def __init__(self, core: Any, graph: Any, inputs: Sequence[np.ndarray]) -> None:
        import openvino as ov

        config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1", "ENABLE_CPU_PINNING": "NO"}
        compiled = core.compile_model(graph, "CPU", config)
        self._request = compiled.create_infer_request()
        self.inputs, self.outputs = inputs, [np.zeros(tuple(port.shape), np.float32) for port in compiled.outputs]
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
    """One turn of N places of a text, from attention to the next turn's queries, keys and values.

    A place's row is ``given | entered | query | key | value``: what the input adds to each turn, what has entered this one, and
    what that makes. Matrices that read the same are one, and the gate's last, of one output, is a sum: the plugin takes as long
    for any other.
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
        """The rows of the first turn, for each id at each place: ``[V, T, 5 * D]``."""
        decoder, T, D, places_T = self.model.model, self.length, self.width, torch.arange(self.length)
        given_VTD = decoder.embed_tokens.weight[:, None].expand(-1, T, -1)
        if self.model.config.positions == "learned":
            given_VTD = given_VTD + decoder.embed_positions(places_T[None])
        state = decoder.first_state(given_VTD)
        given_VTD = F.linear(given_VTD, self.of_given) if self.concat else given_VTD
        entering = self._enter(state.reshape(-1, D), given_VTD.reshape(-1, D), places_T.repeat(len(state)))
        rows = torch.cat([given_VTD, entering.view(-1, T, 4 * D)], -1)
        return np.asarray(rows.numpy())

    def forward(self, place_N: Tensor, row_TW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the gate's logit ``[N, V + 1]``; what enters the next turn with its query, key and value."""
        D = self.width
        given_ND, entered_ND, queries = row_TW[:, : 3 * D][place_N].chunk(3, -1)
        queries, keys, values = (self._heads(part) for part in (queries, *row_TW[:, 3 * D :].chunk(2, -1)))
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask_TT[place_N][None, None])
        hidden_ND = entered_ND + self.block.self_attn.o_proj(mixed[0].transpose(0, 1).flatten(1))
        gate, up = F.linear(self.block.post_attention_layernorm(hidden_ND), self.gate_up).chunk(2, -1)
        state = self.model.model.turn.closed(hidden_ND + self.block.mlp.down_proj(F.silu(gate) * up))
        told, stop = F.linear(self.model.model.read(state), self.told), self.model.gate.stop
        V = self.model.config.vocab_size
        halt = (F.silu(told[..., V:] + self.bias) * stop.weight[0].detach()).sum(-1, keepdim=True) + stop.bias.detach()
        return torch.cat([told[..., :V], halt], -1), self._enter(state, given_ND, place_N)

    def _heads(self, part_ND: Tensor) -> Tensor:
        return torch.unflatten(part_ND, -1, (self.heads, -1)).transpose(0, 1)[None]

    def _enter(self, state: Tensor, given_ND: Tensor, place_N: Tensor) -> Tensor:
        linear = self.concat
        entered = F.linear(state, self.of_state) + given_ND if linear else self.model.model.turn.injected(state, given_ND)
        queries, keys, values = F.linear(self.block.input_layernorm(entered), self.qkv).chunk(3, -1)
        angles = self.cos_TD[place_N], self.sin_TD[place_N]
        turned = apply_rotary_pos_emb(self._heads(queries), self._heads(keys), *angles, unsqueeze_dim=0)
        return torch.cat([entered, *(part[0].transpose(0, 1).flatten(1) for part in turned), values], -1)


Room = tuple[np.ndarray, dict[int, Bound]]


class Compiled:
    """A model's graphs, each compiled when it is first wanted. One run at a time."""

    def __init__(self, model: LoopedForCausalLM) -> None:
        import openvino as ov

        self._model, self._core, self._lock, self._converting = model, ov.Core(), threading.Lock(), threading.Lock()
        self._weights = list(model.parameters())
        self._versions = self._now()
        self._graphs: dict[Any, Any] = {}
        self._bound: list[dict[Any, Bound]] = [{} for _ in range(max(1, len(os.sched_getaffinity(0))))]  # of each thread
        self._firsts: dict[tuple[Any, ...], tuple[_PlaceTurn, np.ndarray, list[Room]]] = {}
        self._threads = ThreadPoolExecutor(len(self._bound), thread_name_prefix="adi-halting")

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

    def _graph(self, thread: int, key: Any, make: Callable[[], nn.Module], *inputs: np.ndarray) -> Bound:
        """The graph of this key for arrays of these shapes and, when it is new to the thread, over them."""
        if (found := self._bound[thread].get(key)) is None:
            with self._converting, torch.no_grad():
                if key not in self._graphs:
                    self._graphs[key] = _converted(make(), tuple(map(torch.tensor, inputs)))
            found = self._bound[thread][key] = Bound(self._core, self._graphs[key], inputs)
        return found

    def _each(self, count: int, work: Callable[[int, Iterator[int]], None]) -> None:
        """Have the threads share items by their numbers; a lone one is this thread's."""
        left = iter(range(count))
        if count == 1:
            work(0, left)
        else:
            list(self._threads.map(work, range(len(self._bound)), [left] * len(self._bound)))

    def _all_turns(self, ids_BT: Tensor, rule: Rule) -> Halted:
        (B, T), V = ids_BT.shape, self._model.config.vocab_size
        ids, logits_BTV = ids_BT.numpy(), np.empty((B, T, V), np.float32)

        def work(thread: int, items: Iterator[int]) -> None:
            key, empty = ("all turns", rule.most, T), np.zeros((1, T), np.int32)
            graph = self._graph(thread, key, lambda: _AllTurns(self._model, rule.most), empty)
            for item in items:
                graph.inputs[0][0] = ids[item]
                graph.run()
                logits_BTV[item] = graph.outputs[0][0]

        self._each(B, work)
        return Halted(torch.from_numpy(logits_BTV), torch.full_like(ids_BT, rule.most))

    def _item_turn(self, ids_BT: Tensor, rule: Rule) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        config, T = self._model.config, ids_BT.shape[1]
        widths = [width * config.hidden_size for width in (config.states, 1)]

        def turn(*rows_NTW: Tensor) -> tuple[Tensor, ...]:
            N = len(rows_NTW[0])
            found = [np.empty((N, *sizes), np.float32) for sizes in ((T, widths[0]), (T, config.vocab_size), ())]

            def work(thread: int, items: Iterator[int]) -> None:
                empty = (np.zeros((1, T, width), np.float32) for width in widths)
                graph = self._graph(thread, ("items", rule.price, T), lambda: _ItemTurn(self._model, T, rule.price), *empty)
                for item in items:
                    for array, rows in zip(graph.inputs, given, strict=True):
                        array[0] = rows[item]
                    graph.run()
                    for whole, array in zip(found, graph.outputs, strict=True):
                        whole[item] = array[0]

            given = [rows.numpy() for rows in rows_NTW]
            self._each(N, work)
            return tuple(map(torch.from_numpy, found))

        return turn

    def _place_turn(self, length: int, price: float | None) -> tuple[_PlaceTurn, np.ndarray, list[Room]]:
        """The module, the rows that enter its first turn, and each thread's room for a text's with the graphs over it, by open
        places."""
        if (length, price) not in self._firsts:
            module = _PlaceTurn(self._model, length, price)
            room: list[Room] = [(np.zeros((length, 5 * module.width), np.float32), {}) for _ in self._bound]
            self._firsts[length, price] = module, module.first(), room
        return self._firsts[length, price]

    def _places(self, ids_BT: np.ndarray, rule: Rule) -> Halted:
        """Places of texts, each until it halts."""
        (B, T), V = ids_BT.shape, self._model.config.vocab_size
        length = -(-T // STEP) * STEP
        module, first, room = self._place_turn(length, rule.price)
        logits_BTV, turns_BT = np.empty((B, T, V), np.float32), np.zeros((B, T), np.int64)
        every_T, price, D = np.arange(T), rule.price, module.width

        def work(thread: int, texts: Iterator[int]) -> None:
            row_TW, graphs = room[thread]
            for text in texts:
                row_TW[:T], open_N = first[ids_BT[text], every_T], every_T
                logits_TV, turns_T, stands = logits_BTV[text], turns_BT[text], _Stands(rule)
                for turn in range(1, rule.most + 1):
                    if (graph := graphs.get(n := len(open_N))) is None:
                        places = np.zeros(_evened(n), np.int32)
                        graph = graphs[n] = self._graph(thread, (price, length, len(places)), lambda: module, places, row_TW)
                    graph.inputs[0][:n] = open_N  # rows behind these are of no account
                    graph.run()
                    told_NV, entering_NW = graph.outputs[0][:n], graph.outputs[1][:n]
                    logits_TV[open_N], turns_T[open_N], row_TW[open_N, D:] = told_NV[:, :V], turn, entering_NW
                    open_N = open_N[stands.left(told_NV)]
                    if not len(open_N):
                        break

        self._each(B, work)
        return Halted(torch.from_numpy(logits_BTV), torch.from_numpy(turns_BT))


class _Stands:
    """Which answers of a text do not stand yet, turn after turn; ``least`` is the gate's logit above which one halts."""

    def __init__(self, rule: Rule) -> None:
        assert rule.threshold is not None
        with np.errstate(divide="ignore"):
            self.least = float(np.log(rule.threshold) - np.log1p(-np.float64(rule.threshold)))
        self._verified = rule.verified
        self._before: tuple[np.ndarray, np.ndarray] | None = None  # who fired last turn, and the answers

    def left(self, told_NV: np.ndarray) -> np.ndarray:
        """By logits and the gate's ``[N, V + 1]`` of those that were left."""
        fired_N = told_NV[:, -1] > self.least
        if not self._verified:
            return np.asarray(~fired_N)
        answer_N = told_NV[:, :-1].argmax(-1)
        left_N = np.ones(len(told_NV), bool) if self._before is None else ~(self._before[0] & (answer_N == self._before[1]))
        self._before = fired_N[left_N], answer_N[left_N]
        return left_N


def _evened(rows: int) -> int:
    """A multiple of 4 or, of many, of a sixteenth to an eighth, so that few graphs are compiled."""
    step = max(4, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def compiled(model: LoopedForCausalLM) -> Compiled:
    """The graphs of this model, kept with it until its weights change."""
    found: Compiled | None = model.__dict__.get("_adi_compiled")
    if found is None or found.outdated():
        found = model.__dict__["_adi_compiled"] = Compiled(model)
    return found
