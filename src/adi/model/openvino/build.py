"""The engine for a loaded transformers model, exported on first use; and for one exported before, without the model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adi.cache import usable_cache
from adi.errors import AdiError, UsageError
from adi.machine import give_back_at_once
from adi.model.backbone import CHUNK
from adi.model.hub import Notice, quiet_transformers
from adi.model.openvino import manifest
from adi.model.openvino.engine import OpenVinoBackbone
from adi.model.openvino.huge_pages import let_go
from adi.model.openvino.row_invariance import merged_rows, prompt_chunk, settle_rows

LEAST_BYTES = {"fp32": 4, "int8": 1, "int4": 0.5}  # of a weight on disk
EXPORTING = threading.Lock()  # the tracer changes state of the whole process


def export_and_open(
    model: Any,
    *,
    name: str,
    precision: str = "int8",
    weights: str | None = None,
    source: Path | None = None,
    samples: Sequence[Sequence[int]] = (),
    stops: Sequence[int] = (),
    notice: Notice = lambda _: None,
    **options: Any,
) -> OpenVinoBackbone:
    """The OpenVINO engine of a transformers model (on the CPU, in evaluation mode), which is left as it was, but for one in 16
    bits that cannot be exported so: that becomes one in 32.

    The export is kept in the cache folder under the weights, the configuration, the precision and the versions that made it.

    Args:
        model: used while it is exported and not kept.
        name: for ``spec.name`` and messages.
        precision: "fp32", "int8" or "int4"; "-bf16" after one of the last two: blocks compute in bfloat16.
        weights: the weights' fingerprint where the caller has it, for example of the checkpoint before it became float32.
        source: the folder that the model was read from; ``open_exported`` then finds the export without the model.
        samples: texts as token ids, to which rounded weights are fitted; without them they are only rounded.
        stops: depths to be ready to stop at, as far as they exist.
        options: as for ``OpenVinoBackbone.open``.
        notice: is told before an export, which takes from seconds to minutes.

    Raises:
        ValueError: an unknown precision, or a model that cannot be exported: one sentence says why.
    """
    from adi.model.hf import HfBackbone  # here, because opening an export needs no transformers
    from adi.model.hf.weights import fingerprint
    from adi.model.openvino.export.in_float32 import in_float32
    from adi.model.openvino.export.pipeline import export

    precision, bfloat16 = _parts(precision)
    if precision not in manifest.PRECISIONS:
        raise UsageError(f"precision {precision!r} is not one of the OpenVINO engine's: {', '.join(manifest.PRECISIONS)}.")
    weights = weights or fingerprint(model)
    key = manifest.key_of(model, weights)
    folder = manifest.export_dir(key, precision)
    with EXPORTING, quiet_transformers():
        if not (folder / "model.json").exists():
            usable_cache(int(sum(p.numel() for p in model.parameters()) * LEAST_BYTES[precision]))
            folder = manifest.export_dir(key, precision)  # perhaps in another cache by now
            give_back_at_once()
            made: Any = (folder, precision, samples, notice, partial(let_go, source) if source else lambda: None)
            try:
                with in_float32(model):
                    export(HfBackbone(model, name, weights), *made)
            except AdiError:
                if model.dtype.itemsize >= 4:
                    raise
                export(HfBackbone(model.float(), name, weights), *made)  # one that looks at other modules' weights
    if source is not None:
        manifest.remember(source, key)
    return _opened(folder, stops, bfloat16=bfloat16, **options)


def open_exported(
    source: Path,
    *,
    precision: str = "int8",
    stops: Sequence[int] = (),
    **options: Any,
) -> OpenVinoBackbone | None:
    """The engine for the model folder ``source`` without reading its weights, or None where it must be exported first.

    An edited folder, another precision, another version of OpenVINO or transformers, or an edit of the exporter needs a new
    export.
    """
    precision, bfloat16 = _parts(precision)
    folder = manifest.recall(source, precision)
    return None if folder is None else _opened(folder, stops, bfloat16=bfloat16, **options)


def _parts(precision: str) -> tuple[str, bool]:
    """That of the weights, which is the export's, and whether blocks compute in bfloat16."""
    return precision.removesuffix(manifest.BFLOAT16), precision.endswith(manifest.BFLOAT16)


def _opened(folder: Path, stops: Sequence[int], **options: Any) -> OpenVinoBackbone:
    backbone = OpenVinoBackbone.open(folder, **options)
    invariant = settle_rows(backbone, folder)
    chunk = prompt_chunk(backbone, folder) if invariant else CHUNK
    backbone.spec = replace(backbone.spec, row_invariant=invariant, merged_rows=merged_rows(backbone, folder), chunk=chunk)
    backbone.prepare([depth for depth in stops if 0 < depth < backbone.spec.layers])  # a hint, perhaps of another model
    return backbone
