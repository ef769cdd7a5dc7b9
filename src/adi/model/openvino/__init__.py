"""The CPU engine: OpenVINO graphs cut at block boundaries, paged attention, weights in 32, 8 or 4 bits."""

from adi.model.openvino.check import rows_are_invariant
from adi.model.openvino.engine import OpenVinoBackbone
from adi.model.openvino.make import make, opened_before

__all__ = ["OpenVinoBackbone", "make", "opened_before", "rows_are_invariant"]
