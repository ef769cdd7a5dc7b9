"""``make``: the engine for a loaded transformers model, exported on first use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adi.model.openvino import store
from adi.model.openvino.compress import PRECISIONS
from adi.model.openvino.engine import KV_BYTES, OpenVinoBackbone
from adi.model.openvino.export import Notice, export


def make(
    model: Any,
    *,
    name: str,
    precision: str = "int8",
    stops: Sequence[int] = (),
    kv_bytes: int = KV_BYTES,
    threads: int | None = None,
    notice: Notice = lambda _: None,
) -> OpenVinoBackbone:
    """The OpenVINO engine of a transformers model (float32, on the CPU, in evaluation mode), which is left as it was.

    The export is kept in the cache folder under the weights, the configuration, the precision and the versions that made it.
    ``precision`` is "fp32", "int8" or "int4"; the other arguments are those of ``OpenVinoBackbone.open``.

    Raises:
        ValueError: an unknown precision, or a model that cannot be exported: one sentence says why.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of the OpenVINO engine's: {', '.join(PRECISIONS)}.")
    folder = store.place(store.key_of(model), precision)
    if not (folder / "model.json").exists():
        export(model, folder, name, precision, notice)
    return OpenVinoBackbone.open(folder, stops=stops, kv_bytes=kv_bytes, threads=threads)
