"""Any transformers decoder on its own modules: the oracle of the other engines, and what training uses."""

from adi.model.hf.engine import HfBackbone

__all__ = ["HfBackbone"]
