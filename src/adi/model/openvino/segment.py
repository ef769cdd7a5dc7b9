"""One compiled piece and its single request; tensors are bound to it only when they change."""

from __future__ import annotations

from typing import Any

from adi.model.openvino.graph import Piece
from adi.model.openvino.inputs import PassInputs
from adi.model.openvino.kv_pool import KVPool

Config = dict[str, str]


class Segment:
    """Blocks [lo, hi), reading its states from the feed's ``state.lo`` and leaving them in ``state.hi``.

    It also leaves ``before.hi``, what entered block ``hi - 1`` (``state.lo`` itself for a single block), and ``mlp.hi``.
    """

    def __init__(self, core: Any, piece: Piece, config: Config) -> None:
        self.lo, self.hi = piece.lo, piece.hi
        compiled = core.compile_model(piece.graph, "CPU", config)
        self._request = compiled.create_infer_request()
        names = [_name(port) for port in compiled.inputs]
        self._inputs = {name: f"state.{self.lo}" if name == "hidden" else name for name in names if "_cache." not in name}
        renamed = {"hidden": f"state.{self.hi}", "before": f"before.{self.hi}", "mlp": f"mlp.{self.hi}"}
        self._outputs = [(renamed[name], _sizes(port)) for name, port in zip(piece.outputs, compiled.outputs, strict=True)]
        self.before = f"before.{self.hi}" if "before" in piece.outputs else f"state.{self.lo}"
        self._feed: PassInputs | None = None
        self._version = -1
        self._ports = {name: port for name, port in zip(names, compiled.inputs, strict=True) if "_cache." in name}

    def add_to(self, pool: KVPool) -> None:
        """Ask the pool for room for these blocks' keys and values."""
        for name, port in self._ports.items():
            pool.add(name, port)

    def run(self, feed: PassInputs, pool: KVPool) -> None:
        """One pass over the rows in ``feed``."""
        if self._version != pool.version:
            for name in self._ports:
                self._request.set_tensor(name, pool.tensors[name])
            self._version = pool.version
        if self._feed is not feed:
            for name, source in self._inputs.items():
                self._request.set_tensor(name, feed.tensors[source])
            for i, (name, sizes) in enumerate(self._outputs):
                self._request.set_output_tensor(i, feed.room(name, [feed.rows if n is None else n for n in sizes]))
            self._feed = feed
        self._request.infer(share_outputs=True)


def _name(port: Any) -> str:
    """The name that this package gave an input; the plugin may add others, numbers."""
    return str(next(name for name in sorted(port.get_names()) if not name.isdigit()))


def _sizes(port: Any) -> list[int | None]:
    """Lengths of an output's axes, None for the one that counts rows."""
    return [None if size.is_dynamic else size.get_length() for size in list(port.get_partial_shape())]


class Head:
    """The model's own norm and head: states ``[T, D]`` to logits ``[1, T, V]`` and the likeliest tokens ``[1, T]``."""

    def __init__(self, core: Any, graph: Any, config: Config) -> None:
        compiled = core.compile_model(graph, "CPU", config)
        self.threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        self._request = compiled.create_infer_request()
        self._counts_rows = any(port.get_any_name() == "position_ids" for port in compiled.inputs)
        self._rows = 0

    def run(self, hidden_TD: Any, least: int = 1) -> tuple[Any, Any]:
        """Arrays of logits and tokens, valid until the next run; ``least``: run so many rows, of which the last are nothing."""
        import numpy as np
        import openvino as ov

        rows = max(least, hidden_TD.shape[0])
        if rows != self._rows:
            self._hidden = np.zeros((1, rows, hidden_TD.shape[1]), np.float32)
            self._request.set_tensor("hidden", ov.Tensor(self._hidden, shared_memory=True))
            if self._counts_rows:
                self._request.set_tensor("position_ids", ov.Tensor(np.zeros((1, rows), np.int64)))
            self._rows = rows
        self._hidden[0, : len(hidden_TD)] = hidden_TD
        self._request.infer(share_outputs=True)
        return self._request.get_output_tensor(0).data, self._request.get_output_tensor(1).data
