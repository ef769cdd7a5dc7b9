"""Weights in 8 or 4 bits, by NNCF; activations stay in float32 between the matrices."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

GROUP = 32  # inputs that share a 4-bit scale and zero point: the block length of GGUF's 4-bit formats, too
PRECISIONS = ("fp32", "int8", "int4")


def compress(blocks: Any, head: Any, precision: str) -> tuple[Any, Any]:
    """Both graphs with weights in ``precision``. At "int4" the embedding and the head's matrix take 8 bits.

    ValueError where a matrix of the blocks has a number of inputs that groups of 32 do not divide.
    """
    if precision == "fp32":
        return blocks, head
    import nncf

    mode = nncf.CompressWeightsMode
    with quiet_nncf():
        if precision == "int4":
            _check_groups(blocks)
            # the embedding first, alone: "all layers in 4 bits" below would take it too
            blocks = nncf.compress_weights(blocks, mode=mode.INT8_ASYM, ignored_scope=nncf.IgnoredScope(types=["MatMul"]))
            blocks = nncf.compress_weights(blocks, mode=mode.INT4_ASYM, group_size=GROUP, ratio=1.0, all_layers=True)
        else:
            blocks = nncf.compress_weights(blocks, mode=mode.INT8_ASYM)
        return blocks, nncf.compress_weights(head, mode=mode.INT8_ASYM)


def _check_groups(blocks: Any) -> None:
    for node in blocks.get_ordered_ops():
        if node.get_type_name() != "MatMul" or node.input_value(1).get_node().get_type_name() != "Constant":
            continue
        shape = node.input_value(1).get_shape()
        inputs = shape[-1] if node.get_attributes()["transpose_b"] else shape[-2]
        if inputs % GROUP:
            raise ValueError(f"a matrix with {inputs} inputs does not divide into groups of {GROUP} for int4; choose int8")


@contextlib.contextmanager
def quiet_nncf() -> Iterator[None]:
    """NNCF prints tables and bars; they are nobody's business here."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
