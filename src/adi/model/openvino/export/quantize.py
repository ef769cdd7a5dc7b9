"""Weights in 8 bits, by NNCF, or mostly in 4; activations stay in float32 between the matrices.

At "int4" the matrices after attention take 4 bits (GPTQ, groups of 32). In 8 bits stay the embedding, the head, what makes
queries, keys and values, and the matrices that would err most, up to a fifth of the rest: measured on SmolLM2-135M,
keys and values alone cost 2.3% of perplexity in 4 bits, and three late matrices more than all others together.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from adi.errors import ModelError
from adi.model.openvino.export.fuse_qkv import is_linear, linears_before
from adi.model.openvino.export.gptq import GROUP, FourBits, gptq
from adi.model.openvino.export.graphs import attended_plainly
from adi.model.openvino.export.smoothquant import smooth
from adi.model.openvino.graph import Attention

SPARED = 1 / 5  # of the weights that could take 4 bits, so many stay in 8: those with the largest error


def quantize(
    blocks: Any, head: Any, precision: str, attentions: Sequence[Attention], samples: Sequence[Sequence[int]]
) -> tuple[Any, Any]:
    """Both graphs with weights in ``precision``, by how they act on ``samples``, texts as token ids.

    ValueError where a matrix that should take 4 bits has a number of inputs that groups of 32 do not divide.
    """
    if precision == "fp32":
        return blocks, head
    if precision == "int8":
        smooth(blocks, attentions, samples)
    else:
        _four_bits(blocks, attentions, samples)
    with quiet_nncf():
        import nncf

        mode = nncf.CompressWeightsMode.INT8_ASYM
        return nncf.compress_weights(blocks, mode=mode), nncf.compress_weights(head, mode=mode)


def _four_bits(blocks: Any, attentions: Sequence[Attention], samples: Sequence[Sequence[int]]) -> None:
    """Put 4-bit weights in place of the matrices of ``blocks`` that take them; NNCF leaves those alone afterwards."""
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
        weight = torch.from_numpy(node.input_value(1).get_node().data.astype(np.float32))
        found.append((node, gptq(weight, hessians[_source(node)])))
    left = SPARED * sum(made.codes_NK.numel() for _, made in found)
    for node, made in sorted(found, key=lambda pair: -pair[1].error):
        left -= made.codes_NK.numel()
        if left < 0:
            node.input(1).replace_source_output(_decompressed(made).output(0))


def _hessians(blocks: Any, attentions: Sequence[Attention], nodes: Sequence[Any], samples: Sequence[Sequence[int]]) -> Any:
    """``sum of x x^T`` over the inputs x of each matrix, by the input's name; the identity where there is no text."""
    import openvino as ov
    import torch

    widths = {_source(node): node.input_value(1).get_shape()[1] for node in nodes}
    found = {name: torch.eye(width) * (not samples) for name, width in widths.items()}
    if not samples:
        return found
    graph = attended_plainly(blocks, attentions, {_source(node): node.get_friendly_name() for node in nodes})
    request = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    for ids in samples:
        request.infer([np.array([ids], np.int64), np.arange(len(ids), dtype=np.int64)[None]])
        for i, name in enumerate(widths):
            x_TK = torch.from_numpy(request.get_output_tensor(i).data.reshape(-1, widths[name]))
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


@contextlib.contextmanager
def quiet_nncf() -> Iterator[None]:
    """NNCF logs tables and draws bars, and torch warns that it finds no CUDA as NNCF is imported; nobody's business here.

    What other threads print is left alone. One export runs at a time, so nobody else changes these settings.
    """
    torch_log = logging.getLogger("torch.utils.cpp_extension")
    before = torch_log.level
    torch_log.setLevel(logging.ERROR)
    from nncf.quantization.algorithms.weight_compression import algorithm

    log, track = logging.getLogger("nncf"), algorithm.track
    level = log.level
    log.setLevel(logging.ERROR)
    algorithm.track = functools.partial(track, disable=True)
    try:
        yield
    finally:
        algorithm.track = track
        log.setLevel(level)
        torch_log.setLevel(before)
