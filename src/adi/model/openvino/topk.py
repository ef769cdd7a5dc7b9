"""The model's head as a graph that gives the likeliest tokens and the total instead of the whole vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np

from adi.model.backbone import TopK
from adi.model.openvino.segments import Config


class TopKHeads:
    """``top_k_tokens`` of an engine; compiled on first use, once for each number of tokens asked for."""

    def __init__(self, core: Any, head: Any, config: Config) -> None:
        self._make = (core, head, config)
        self._requests: dict[int, Any] = {}

    def run(self, hidden_TD: Any, most: int) -> TopK:
        """For states ``[T, D]``; copies."""
        import openvino as ov
        import torch

        if most not in self._requests:
            core, head, config = self._make
            self._requests[most] = core.compile_model(_graph(head.clone(), most), "CPU", config).create_infer_request()
        request = self._requests[most]
        for port in request.model_inputs:
            counts = port.get_any_name() == "position_ids"
            given = np.zeros((1, len(hidden_TD)), np.int64) if counts else hidden_TD[None]
            request.set_tensor(port, ov.Tensor(np.ascontiguousarray(given)))
        request.infer()
        values, places, total = (request.get_output_tensor(i).data[0] for i in range(3))
        return TopK(
            torch.from_numpy(values.copy()), torch.from_numpy(places.astype(np.int64)), torch.from_numpy(total[:, 0].copy())
        )


def _graph(head: Any, most: int) -> Any:
    """Outputs: logits ``[1, T, most]``, their tokens, and the logsumexp of all logits ``[1, T, 1]``."""
    import openvino as ov
    from openvino import opset13 as ops

    (logits,) = (node for node in head.get_results() if node.get_friendly_name() == "logits")
    source = logits.input_value(0)
    best = ops.topk(source, np.int32(most), -1, "max", "value", index_element_type="i32")
    top = ops.reduce_max(source, ops.constant(np.int64(-1)), True)
    summed = ops.reduce_sum(ops.exp(ops.subtract(source, top)), ops.constant(np.int64(-1)), True)
    total = ops.add(ops.log(summed), top)
    results = [ops.result(output) for output in (best.output(0), best.output(1), total.output(0))]
    return ov.Model(results, head.get_parameters(), "topk")
