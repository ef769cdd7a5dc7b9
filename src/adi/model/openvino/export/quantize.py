"""Weights in 8 bits, or mostly in 4; activations stay in float32 between the matrices.

At "int4" the matrices after attention take 4 bits (GPTQ, groups of 32). In 8 bits stay the embedding, the head, what makes
queries, keys and values, and the matrices that would err most, up to a fifth of the rest: measured on SmolLM2-135M,
keys and values alone cost 2.3% of perplexity in 4 bits, and three late matrices more than all others together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adi.errors import ModelError
from adi.model.openvino.export.constants import is_weight, slabs, weight_of
from adi.model.openvino.export.fuse_qkv import is_linear, linears_before
from adi.model.openvino.export.gptq import GROUP, FourBits, gptq
from adi.model.openvino.export.graphs import observed
from adi.model.openvino.export.smoothquant import smooth
from adi.model.openvino.graph import Attention

SPARED = 1 / 5  # of the weights that could take 4 bits, so many stay in 8: those with the largest error


def quantize(
    blocks: Any,
    head: Any,
    precision: str,
    attentions: Sequence[Attention],
    samples: Sequence[Sequence[int]],
    let_go: Callable[[], object] = lambda: None,
) -> tuple[Any, Any]:
    """Both graphs with weights in ``precision``, by how they act on ``samples``, texts as token ids. ``let_go`` is called after
    each matrix.

    ValueError where a matrix that should take 4 bits has a number of inputs that groups of 32 do not divide.
    """
    if precision == "fp32":
        return blocks, head
    if precision == "int8":
        smooth(blocks, attentions, samples)
    else:
        _four_bits(blocks, attentions, samples)
    for graph in (blocks, head):
        _eight_bits(graph, let_go)
    return blocks, head


def _eight_bits(graph: Any, let_go: Callable[[], object]) -> None:
    """Round what is left of constant matrices, the embedding among them: 256 levels from each output's least to its largest
    weight. A matrix that several read is rounded once."""
    made: dict[tuple[str, int, bool], Any] = {}
    for node in graph.get_ordered_ops():
        kind = node.get_type_name()
        for port in {"MatMul": (0, 1), "Gather": (0,)}.get(kind, ()):
            source = node.input_value(port)
            if len(source.get_partial_shape()) < 2 or not is_weight(source):
                continue
            across = kind == "MatMul" and node.get_attributes()[("transpose_a", "transpose_b")[port]] == (port == 0)
            key = source.get_node().get_name(), source.get_index(), across
            if key not in made:
                made[key] = _rounded(source, -2 if across else -1)
                let_go()
            node.input(port).replace_source_output(made[key])
    graph.validate_nodes_and_infer_types()


def _rounded(source: Any, axis: int) -> Any:
    """A weight in 8 bits, with a scale and a zero point for all numbers along an axis, and what makes numbers of it again."""
    from openvino import opset13 as ops

    shape = tuple(source.get_shape())
    least = (*shape[:axis], 1, *shape[axis:][1:])
    codes, zeros, scales = np.empty(shape, np.uint8), np.empty(least, np.uint8), np.empty(least, np.float32)
    for at, part in slabs(source) if len(shape) > 2 or axis == -1 else [(0, weight_of(source))]:
        rows = slice(at, at + len(part))
        low, high = part.min(axis, keepdims=True).clip(max=0), part.max(axis, keepdims=True).clip(min=0)
        scales[rows] = scale = np.maximum((high - low) / 255, np.finfo(np.float32).tiny)
        zeros[rows] = zero = np.round(-low / scale)
        part = part / scale
        part += zero
        codes[rows] = np.round(part, out=part).clip(0, 255, out=part)
    whole, origin = (ops.convert(ops.constant(values, shared_memory=True), "f32") for values in (codes, zeros))
    return ops.multiply(ops.subtract(whole, origin), ops.constant(scales)).output(0)


def _four_bits(blocks: Any, attentions: Sequence[Attention], samples: Sequence[Sequence[int]]) -> None:
    """Put 4-bit weights in place of the matrices of ``blocks`` that take them; the others take 8 bits afterwards."""
    import torch

    keys = {f"{kind}.{i}" for kind in ("query", "key", "value") for i in range(len(attentions))}
    before = linears_before([node for node in blocks.get_results() if node.get_friendly_name() in keys])
    kept = {node.get_friendly_name() for node in before}
    chosen = [node for node in _linears(blocks) if node.get_friendly_name() not in kept]
    for node in chosen:
        if node.input_value(1).get_shape()[1] % GROUP:
            raise ModelError(
                f"a matrix with {node.input_value(1).get_shape()[1]} inputs does not divide into groups of {GROUP} for int4; "
                "choose int8"
            )
    hessians = _hessians(blocks, attentions, chosen, samples)
    found: list[tuple[Any, FourBits]] = []
    for node in chosen:
        found.append((node, gptq(torch.from_numpy(weight_of(node.input_value(1))), hessians[_source(node)])))
    left = SPARED * sum(made.codes_NK.numel() for _, made in found)
    for node, made in sorted(found, key=lambda pair: -pair[1].error):
        left -= made.codes_NK.numel()
        if left < 0:
            node.input(1).replace_source_output(_decompressed(made).output(0))


def _hessians(blocks: Any, attentions: Sequence[Attention], nodes: Sequence[Any], samples: Sequence[Sequence[int]]) -> Any:
    """``sum of x x^T`` over the inputs x of each matrix, by the input's name; None where there is no text."""
    import torch

    if not samples:
        return dict.fromkeys(map(_source, nodes))
    widths = {_source(node): node.input_value(1).get_shape()[1] for node in nodes}
    found = {name: torch.zeros(width, width) for name, width in widths.items()}
    names = {_source(node): node.get_friendly_name() for node in nodes}
    for name, x in observed(blocks, attentions, names, samples):
        x_TK = torch.from_numpy(x)
        found[name].addmm_(x_TK.T, x_TK)
    return found


def _linears(graph: Any) -> list[Any]:
    return [node for node in graph.get_ordered_ops() if is_linear(node)]


def _source(node: Any) -> tuple[str, int]:
    source = node.input_value(0)
    return source.get_node().get_friendly_name(), source.get_index()


def _decompressed(made: FourBits) -> Any:
    """Constants in 4 bits and the small graph that makes a matrix of them, as the plugin knows it."""
    from openvino import opset13 as ops

    rows, inputs = made.codes_NK.shape
    grouped = (rows, inputs // GROUP, GROUP)
    codes = ops.convert(_packed(made.codes_NK.numpy(), grouped), "f32")
    zeros = ops.convert(_packed(made.zero_NG.numpy(), (*grouped[:2], 1)), "f32")
    scales = ops.constant(made.scale_NG.numpy().reshape(*grouped[:2], 1).astype(np.float32))
    matrix = ops.multiply(ops.subtract(codes, zeros), scales)
    return ops.reshape(matrix, np.array([rows, inputs], np.int64), False)


def _packed(values: Any, shape: tuple[int, ...]) -> Any:
    """Whole numbers 0 to 15 as a constant of type u4, two to a byte, the first one in the low half."""
    import openvino as ov
    from openvino import opset13 as ops

    flat = values.astype(np.uint8).reshape(-1)
    flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.uint8)])
    tensor = ov.Tensor(ov.Type.u4, ov.Shape(list(shape)))
    tensor.data[:] = (flat[0::2] | (flat[1::2] << 4)).reshape(tensor.data.shape)
    return ops.constant(tensor)
