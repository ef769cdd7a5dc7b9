"""Weights in a traced graph: constants as the checkpoint has them, in 16 bits mostly, and what little is calculated from them.

Nothing is made of a matrix before it is rounded: merged ones are a concatenation, smoothed ones a product, and rounding goes
some rows at a time. So an export never holds its weights a second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

SLAB_BYTES = 64 << 20  # of a matrix in 32 bits, at a time
SMALL = 1 << 16  # numbers; what is no larger becomes a plain constant at once
ALL_INPUTS = ("Concat", "Multiply")  # the others calculate with their first input alone
FIRST_INPUT = ("Convert", "Transpose", "Split", "VariadicSplit", "Slice", "StridedSlice", "Reshape", "Squeeze", "Unsqueeze")


def leaves(output: Any) -> list[Any]:
    """The constants that an output is calculated from; none where it is calculated from anything else."""
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return [node]
    if kind not in ALL_INPUTS + FIRST_INPUT:
        return []
    parts = [leaves(source) for source in (node.input_values() if kind in ALL_INPUTS else node.input_values()[:1])]
    return [leaf for part in parts for leaf in part] if all(parts) else []


def is_weight(output: Any) -> bool:
    """Whether an output is made of constant real numbers alone."""
    found = leaves(output)
    return bool(found) and all(leaf.get_output_element_type(0).is_real() for leaf in found)


def weight_of(output: Any) -> Any:
    """All numbers of a weight, in float32."""
    return np.concatenate([part for _, part in slabs(output, math.inf)]) if output.get_shape() else _calculated(output)


def slabs(output: Any, most: float = SLAB_BYTES) -> Iterator[tuple[int, Any]]:
    """A weight's rows in float32, about so many bytes at a time, and the number of the first."""
    shape = output.get_shape()
    step = max(1, int(min(shape[0], most // (4 * math.prod(shape[1:])))))
    whole = None if _goes_by_rows(output) else _calculated(output)
    for at in range(0, shape[0], step):
        yield at, _rows(output, at, min(at + step, shape[0])) if whole is None else whole[at : at + step]


def _goes_by_rows(output: Any) -> bool:
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Concat":
        return node.get_attributes()["axis"] == 0 and all(map(_goes_by_rows, node.input_values()))
    if kind == "Multiply":
        return len(node.input_value(1).get_shape()) == 1 and _goes_by_rows(node.input_value(0))
    return kind == "Constant" or (kind == "Convert" and _goes_by_rows(node.input_value(0)))


def _rows(output: Any, lo: int, hi: int) -> Any:
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return _widened(node, lo, hi)
    if kind == "Convert":
        return _rows(node.input_value(0), lo, hi)
    if kind == "Multiply":
        return _rows(node.input_value(0), lo, hi) * weight_of(node.input_value(1))
    found, begin = [], 0
    for part in node.input_values():
        end = begin + part.get_shape()[0]
        if lo < end and begin < hi:
            found.append(_rows(part, max(lo, begin) - begin, min(hi, end) - begin))
        begin = end
    return np.concatenate(found)


def _widened(constant: Any, lo: int, hi: int) -> Any:
    """Rows of a constant in 64, 32 or 16 bits; numpy has no bfloat16, whose bits are the upper half of a float32's."""
    rows = constant.data[lo:hi]
    if constant.get_output_element_type(0).to_string() == "bf16":
        return (np.ascontiguousarray(rows).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)


def _calculated(output: Any) -> Any:
    """By the plugin, whatever the operations."""
    import openvino as ov
    from openvino import opset13 as ops

    graph = ov.Model([ops.result(ops.convert(output, "f32"))], [], "weight")
    return ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})()[0]


def settle_small(graph: Any) -> None:
    """Make plain constants in 32 bits of all small weights: norms' gains, biases."""
    from openvino import opset13 as ops

    for node in graph.get_ordered_ops():
        wide = node.get_type_name() == "Convert" and node.get_output_element_type(0).to_string() == "f32"
        if wide and is_weight(node.output(0)) and math.prod(shape := node.get_output_shape(0)) <= SMALL:
            constant = ops.constant(np.ascontiguousarray(weight_of(node.output(0)).reshape(shape)))
            for user in node.output(0).get_target_inputs():
                user.replace_source_output(constant.output(0))
