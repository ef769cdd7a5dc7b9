"""The CPU engine: OpenVINO graphs cut at block boundaries, paged attention, weights in 32, 8 or 4 bits."""

from adi.model.openvino.build import export_and_open, open_exported
from adi.model.openvino.engine import OpenVinoBackbone
from adi.model.openvino.row_invariance import rows_are_invariant

__all__ = ["OpenVinoBackbone", "export_and_open", "open_exported", "rows_are_invariant"]
