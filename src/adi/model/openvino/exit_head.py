"""Exit heads as compiled graphs: a look costs one call, and torch's threads stay out of it."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from adi.model.arrays import Array, as_array
from adi.model.backbone import HeadRows, LightHead
from adi.model.openvino.segments import Config

if TYPE_CHECKING:
    from torch import Tensor


class CompiledLightHead:
    """One depth's head over states ``[T, D]``; compiled on first use. Matrices take 8 bits a weight if ``eight_bits``."""

    def __init__(self, core: Any, head: LightHead, config: Config, eight_bits: bool) -> None:
        self._make = (core, head, config, eight_bits)
        self._request: Any = None
        self._hidden = np.zeros((0, 0), np.float32)
        self._lock = threading.Lock()

    def read(self, hidden_TD: Tensor) -> HeadRows:
        import torch

        with self._lock:
            self._run(hidden_TD)
            best = self._request.get_output_tensor(0).data
            place_T = torch.from_numpy(best[:, 0].astype(np.int64))
            values = torch.from_numpy(self._request.get_output_tensor(1).data.copy())
        return HeadRows(place_T, *values.unbind(1))

    def log_probs(self, hidden_TD: Tensor) -> Tensor:
        import torch

        with self._lock:
            self._run(hidden_TD)
            return torch.from_numpy(self._request.get_output_tensor(2).data.copy())

    def _run(self, hidden_TD: Tensor) -> None:
        import openvino as ov

        if self._request is None:
            core, head, config, eight_bits = self._make
            self._request = core.compile_model(_graph(head, eight_bits), "CPU", config).create_infer_request()
        given = hidden_TD.detach().numpy()
        if self._hidden.shape != given.shape:
            self._hidden = np.zeros(given.shape, np.float32)
            self._request.set_input_tensor(ov.Tensor(self._hidden, shared_memory=True))
        self._hidden[:] = given
        self._request.infer(share_outputs=True)


def _graph(head: LightHead, eight_bits: bool) -> Any:
    """Outputs: places of the two likeliest ``[T, 2]``; first, second, tail and entropy ``[T, 4]``; all log-probabilities."""
    import openvino as ov
    from openvino import opset13 as ops

    shortlist, width = head.weight_SD.shape
    hidden = ops.parameter(ov.PartialShape([-1, width]), ov.Type.f32, name="hidden")
    x = _normalised(hidden, head)
    x = ops.add(x, product(product(x, head.down_DR.T, eight_bits), head.up_DR, eight_bits))
    rows = np.concatenate([array_of(head.weight_SD), array_of(head.tail_D)[None]])
    bias = np.zeros(shortlist, np.float32) if head.bias_S is None else array_of(head.bias_S)
    logits = ops.add(product(x, rows, eight_bits), ops.constant(np.concatenate([bias, array_of(head.tail_bias).reshape(1)])))
    logs = ops.log_softmax(logits, 1)
    last = ops.constant(np.int64(1))
    parts = ops.variadic_split(logs, last, ops.constant(np.array([shortlist, 1], np.int64)))
    inside, tail = parts.output(0), parts.output(1)
    best = ops.topk(inside, np.int32(min(2, shortlist)), 1, "max", "value", index_element_type="i32")
    pair = best.output(0) if shortlist > 1 else ops.concat([best.output(0), tail], 1)  # of one token the tail is the rival
    spread = ops.multiply(ops.exp(tail), ops.constant(np.float32(math.log(max(head.outside, 1)))))
    summed = ops.reduce_sum(ops.multiply(ops.exp(logs), logs), last, True)
    values = ops.concat([pair, tail, ops.subtract(spread, summed)], 1)
    return ov.Model([ops.result(best.output(1)), ops.result(values), ops.result(inside)], [hidden], "light_head")


def _normalised(hidden: Any, head: LightHead) -> Any:
    from openvino import opset13 as ops

    axis = ops.constant(np.array([1], np.int64))
    if head.norm == "layer":
        hidden = ops.subtract(hidden, ops.reduce_mean(hidden, axis, True))
    square = ops.reduce_mean(ops.multiply(hidden, hidden), axis, True)
    x = ops.divide(hidden, ops.sqrt(ops.add(square, ops.constant(np.float32(head.eps)))))
    return ops.add(ops.multiply(x, ops.constant(array_of(head.gain_D)[None])), ops.constant(array_of(head.shift_D)[None]))


def product(x: Any, matrix_NK: Any, eight_bits: bool) -> Any:
    """``x @ matrix.T``, the matrix rounded to 8 bits with a scale for each of its rows."""
    from openvino import opset13 as ops

    matrix = matrix_NK if isinstance(matrix_NK, np.ndarray) else array_of(matrix_NK)
    if not eight_bits:
        return ops.matmul(x, ops.constant(matrix), False, True)
    scale = np.maximum(np.abs(matrix).max(1, keepdims=True) / 127, 1e-12).astype(np.float32)
    codes = ops.convert(ops.constant(np.round(matrix / scale).astype(np.int8)), "f32")
    return ops.matmul(x, ops.multiply(codes, ops.constant(scale)), False, True)


def array_of(given: Array) -> Any:
    return np.ascontiguousarray(as_array(given), np.float32)
