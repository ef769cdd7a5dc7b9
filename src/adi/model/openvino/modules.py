"""Torch functions as compiled graphs: exit heads and drafters. And the model's embedding as a graph of its own.

A function is converted once for each export and kept beside it, so that decoding starts without torch after the first time.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adi.cache import whole_folder
from adi.errors import FileError
from adi.model import arrays
from adi.model.backbone import TensorFunction
from adi.model.openvino.graph import embedding_graph
from adi.model.openvino.segments import Config

KEPT_TOKENS = 4096
LEAST_OUTPUTS = 16  # matrices with fewer stay in 32 bits
CONVERTER = (Path(__file__), Path(arrays.__file__))  # what is kept was made by this code


class OpenVinoModule:
    """A graph over rows ``[T, width]``; compiled on first use, for a lone row with fixed shapes, which is what drafting asks
    for. One call at a time."""

    def __init__(self, core: Any, graph: Callable[[], Any], config: Config) -> None:
        self._core, self._graph, self._config = core, graph, config
        self._requests: dict[bool, Any] = {}
        self._ready: dict[int, tuple[Any, list[Any], range]] = {}
        self._lock = threading.Lock()

    def __call__(self, *rows_TD: Any) -> tuple[Any, ...]:
        rows = len(rows_TD[0])
        with self._lock:
            if rows not in self._ready:
                self._ready[rows] = self._bound(rows, [array.shape[1] for array in rows_TD])
            request, inputs, outputs = self._ready[rows]
            for mine, given in zip(inputs, rows_TD, strict=True):
                mine[:] = given
            request.infer(share_outputs=True)
            return tuple(request.get_output_tensor(i).data.copy() for i in outputs)

    def _bound(self, rows: int, widths: Sequence[int]) -> tuple[Any, list[Any], range]:
        """The request for a lone row or for any number of rows, the arrays that it reads, and its outputs."""
        import openvino as ov

        lone = rows == 1
        if lone not in self._requests:
            graph = self._graph()
            if lone:
                graph.reshape({i: ov.PartialShape([1, width]) for i, width in enumerate(widths)})
            self._requests[lone] = self._core.compile_model(graph, "CPU", self._config).create_infer_request()
        request, inputs = self._requests[lone], [np.zeros((rows, width), np.float32) for width in widths]
        for i, array in enumerate(inputs):
            request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))
        if not lone:  # its inputs are set to other arrays with every other number of rows
            self._ready = {count: bound for count, bound in self._ready.items() if count == 1}
        return request, inputs, range(len(request.model_outputs))


def converted(
    core: Any, folder: Path | None, name: str, function: Callable[[], TensorFunction], widths: Sequence[int], eight_bits: bool
) -> Any:
    """The function as a graph, from ``folder`` where it was converted before; without a folder nothing is kept."""
    import openvino as ov

    if folder is None or not folder.is_dir():  # deleted meanwhile
        return _convert(function(), widths, eight_bits)
    code = hashlib.blake2b(b"".join(path.read_bytes() for path in CONVERTER), digest_size=4).hexdigest()
    kept = folder / "modules" / f"{name}-{code}"
    try:
        return core.read_model(kept / "graph.xml")
    except RuntimeError:  # not there yet, or damaged
        shutil.rmtree(kept, ignore_errors=True)
    graph = _convert(function(), widths, eight_bits)
    with contextlib.suppress(FileError), whole_folder(kept) as fresh:  # which may not be ours to write
        ov.save_model(graph, fresh / "graph.xml", compress_to_fp16=False)
    return graph


def _convert(function: TensorFunction, widths: Sequence[int], eight_bits: bool) -> Any:
    import openvino as ov
    import torch
    from openvino.passes import ConstantFolding, Manager

    example = tuple(torch.zeros(2, width) for width in widths)
    with torch.no_grad(), warnings.catch_warnings():
        tracer: Any = torch.jit
        warnings.simplefilter("ignore", tracer.TracerWarning)  # widths are fixed, and become constants
        traced = torch.jit.trace(function, example, check_trace=False)
    graph = ov.convert_model(traced, example_input=example, input=[ov.PartialShape([-1, width]) for width in widths])
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(graph)
    if eight_bits:
        _round_matrices(graph)
    return graph


def _round_matrices(graph: Any) -> None:
    """Round constant matrices to 8 bits with a scale for each output."""
    from openvino import opset13 as ops

    for node in graph.get_ordered_ops():
        constant = node.input_value(1).get_node() if node.get_type_name() == "MatMul" else None
        if constant is None or constant.get_type_name() != "Constant" or len(constant.get_output_shape(0)) != 2:
            continue
        matrix_NK = constant.data if node.get_attributes()["transpose_b"] else constant.data.T
        if len(matrix_NK) < LEAST_OUTPUTS:
            continue
        scale = np.maximum(np.abs(matrix_NK).max(1, keepdims=True) / 127, 1e-12).astype(np.float32)
        codes = ops.convert(ops.constant(np.ascontiguousarray(np.round(matrix_NK / scale).astype(np.int8))), "f32")
        rounded = ops.matmul(node.input_value(0), ops.multiply(codes, ops.constant(scale)), False, True)
        for user in node.output(0).get_target_inputs():
            user.replace_source_output(rounded.output(0))
    graph.validate_nodes_and_infer_types()


class Embedding:
    """What enters the first block for tokens at position 0: the part of the blocks' graph below ``state.0``."""

    def __init__(self, core: Any, blocks: Any, config: Config) -> None:
        self._make = (core, blocks, config)
        self._lock = threading.Lock()
        self._request: Any = None
        self._lately: dict[int, Any] = {}

    def run(self, ids: Sequence[int]) -> Any:
        """States ``[T, D]``, not to be written to: a lone token's is remembered, since drafters ask for the same ones again and
        again."""
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
                self._request = core.compile_model(embedding_graph(blocks.clone()), "CPU", config).create_infer_request()
            for port in self._request.model_inputs:
                self._request.set_tensor(port, ov.Tensor(named[port.get_any_name()]))
            self._request.infer()
            return self._request.get_output_tensor(0).data[0].copy()
