"""Drafters as compiled graphs, and the model's embedding as a graph of its own."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from adi.model.arrays import as_array
from adi.model.backbone import DraftNet
from adi.model.openvino.exit_head import array_of, product
from adi.model.openvino.segments import Config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NORM_EPS = 1e-5
KEPT_TOKENS = 4096


class CompiledDrafter:
    """One step of a recurrent drafter; compiled on first use, for each number of rows with fixed shapes. States are arrays.

    Matrices take 8 bits a weight if asked. ``embed`` gives what enters the first block for lone tokens.
    """

    def __init__(
        self, core: Any, net: DraftNet, config: Config, eight_bits: bool, embed: Callable[[Sequence[int]], Any]
    ) -> None:
        self._make = (core, net, config, eight_bits)
        self._embed = embed
        self._gain, self._shift = array_of(net.gain_D), array_of(net.shift_D)
        self._ready: dict[int, tuple[Any, list[Any]]] = {}
        self._lock = threading.Lock()

    def start(self, raw_1D: Any) -> Any:
        net, x = self._make[1], as_array(raw_1D)
        if net.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        square = np.einsum("td,td->t", x, x)[:, None] / x.shape[1]
        return x * (self._gain / np.sqrt(square + np.float32(net.eps))) + self._shift

    def step(self, token: int, state_1D: Any) -> tuple[int, float, Any]:
        place_T, log_T, state_1D = self.steps(self._embed((token,)), state_1D)
        return int(place_T[0]), float(log_T[0]), state_1D

    def steps(self, x_TD: Any, state_TD: Any) -> tuple[Any, Any, Any]:
        """A step at T rows side by side: places and log-probabilities of the likeliest tokens ``[T]``, next states."""
        with self._lock:
            request, given = self._for(len(state_TD))
            given[0][:], given[1][:] = x_TD, state_TD
            request.infer(share_outputs=True)
            place, log, state = (request.get_output_tensor(i).data.copy() for i in range(3))
        return place.reshape(-1), log.reshape(-1), state

    def _for(self, rows: int) -> tuple[Any, list[Any]]:
        """The request for so many rows, and the arrays that it reads."""
        import openvino as ov

        if rows not in self._ready:
            core, net, config, eight_bits = self._make
            request = core.compile_model(_graph(net, eight_bits, rows), "CPU", config).create_infer_request()
            given = [np.zeros((rows, net.weight_SD.shape[1]), np.float32) for _ in range(2)]
            for i, each in enumerate(given):
                request.set_input_tensor(i, ov.Tensor(each, shared_memory=True))
            self._ready[rows] = request, given
        return self._ready[rows]


class Embedding:
    """What enters the first block for tokens at position 0: the part of the blocks' graph below ``state.0``."""

    def __init__(self, core: Any, blocks: Any, config: Config) -> None:
        self._make = (core, blocks, config)
        self._lock = threading.Lock()
        self._request: Any = None
        self._lately: dict[int, Any] = {}

    def run(self, ids: Sequence[int]) -> Any:
        """States ``[T, D]``; a lone token's is remembered, and not to be written to, since drafters ask for the same ones again
        and again."""
        if len(ids) > 1:
            return self._infer(ids)
        if (known := self._lately.get(ids[0])) is None:
            if len(self._lately) >= KEPT_TOKENS:
                self._lately.clear()
            known = self._lately[ids[0]] = self._infer(ids)
        return known

    def _infer(self, ids: Sequence[int]) -> Any:
        import openvino as ov

        tokens = np.array([tuple(ids)], np.int64)
        named = {"input_ids": tokens, "position_ids": np.zeros_like(tokens)}
        with self._lock:
            if self._request is None:
                core, blocks, config = self._make
                self._request = core.compile_model(_embedding(blocks.clone()), "CPU", config).create_infer_request()
            for port in self._request.model_inputs:
                self._request.set_tensor(port, ov.Tensor(named[port.get_any_name()]))
            self._request.infer()
            return self._request.get_output_tensor(0).data[0].copy()


def _embedding(graph: Any) -> Any:
    import openvino as ov
    from openvino import opset13 as ops

    (state,) = (node for node in graph.get_results() if node.get_friendly_name() == "state.0")
    result = ops.result(state.input_value(0))
    inputs = [node for node in graph.get_parameters() if node.get_friendly_name() in ("input_ids", "position_ids")]
    return ov.Model([result], _read_by(result, inputs), "embedding")


def _read_by(result: Any, inputs: Sequence[Any]) -> list[Any]:
    """Those of the inputs that lead to ``result``."""
    stack, seen = [result], set[str]()
    while stack:
        node = stack.pop()
        if node.get_name() not in seen:
            seen.add(node.get_name())
            stack += [port.get_source_output().get_node() for port in node.inputs()]
    return [node for node in inputs if node.get_name() in seen]


def _graph(net: DraftNet, eight_bits: bool, rows: int) -> Any:
    """Inputs ``x`` and ``state``; outputs: place of the likeliest token, its log-probability ``[T, 1]``, next state."""
    import openvino as ov
    from openvino import opset13 as ops

    w = net.weights
    shortlist, width = net.weight_SD.shape
    x, state = (ops.parameter(ov.PartialShape([rows, width]), ov.Type.f32, name=name) for name in ("x", "state"))
    given = ops.concat([_norm(x, "rms", NORM_EPS, array_of(w["shallow_D"])), state], 1)
    u = product(given, w["mix_DE"], eight_bits)
    n = _norm(u, "rms", NORM_EPS, array_of(w["gain_D"]))
    gated = ops.multiply(ops.swish(product(n, w["gate_FD"], eight_bits)), product(n, w["up_FD"], eight_bits))
    u = ops.add(u, product(gated, w["down_DF"], eight_bits))
    out = ops.add(_norm(u, net.norm, net.eps, array_of(w["out_D"])), ops.constant(array_of(w["shift_D"])[None]))
    words = np.concatenate([array_of(net.weight_SD), array_of(w["tail_D"])[None]])
    bias = np.zeros(shortlist, np.float32) if net.bias_S is None else array_of(net.bias_S)
    logits = product(out, words, eight_bits)
    logits = ops.add(logits, ops.constant(np.concatenate([bias, array_of(w["tail_bias"]).reshape(1)])))
    inside = ops.slice(logits, *(np.array([n], np.int32) for n in (0, shortlist, 1, 1)))
    best = ops.topk(inside, np.int32(1), 1, "max", "value", index_element_type="i32")
    log = ops.subtract(best.output(0), _total(logits))
    return ov.Model([ops.result(best.output(1)), ops.result(log), ops.result(out)], [x, state], "drafter")


def _total(logits: Any) -> Any:
    """The logarithm of the sum of exponentials over the last axis."""
    from openvino import opset13 as ops

    axis = ops.constant(np.array([1], np.int64))
    top = ops.reduce_max(logits, axis, True)
    return ops.add(ops.log(ops.reduce_sum(ops.exp(ops.subtract(logits, top)), axis, True)), top)


def _norm(x: Any, kind: str, eps: float, gain_D: Any) -> Any:
    from openvino import opset13 as ops

    axis = ops.constant(np.array([1], np.int64))
    if kind == "layer":
        x = ops.subtract(x, ops.reduce_mean(x, axis, True))
    square = ops.reduce_mean(ops.multiply(x, x), axis, True)
    x = ops.divide(x, ops.sqrt(ops.add(square, ops.constant(np.float32(eps)))))
    return ops.multiply(x, ops.constant(gain_D[None]))
