"""Numbers as numpy arrays or as tensors.

Files and the compiled engine give arrays, so that decoding there needs no torch, whose import takes seconds; transformers'
modules and training speak tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array = Any  # of either kind


def as_tensor(given: Array) -> Tensor:
    """A tensor; an array as one over the same memory."""
    import torch

    return given if isinstance(given, torch.Tensor) else torch.from_numpy(given)


def as_array(given: Array) -> Any:
    """A numpy array; a tensor, of any device and grown by any graph, as one over the same memory where that can be."""
    return given if isinstance(given, np.ndarray) else given.detach().cpu().numpy()


def joined(given: Sequence[Array]) -> Array:
    """One after the other along the first axis, all of one kind."""
    if isinstance(given[0], np.ndarray):
        return np.concatenate(given)
    import torch

    return torch.cat(list(given))


def normalise(hidden_TD: Tensor, norm: str, eps: float) -> Tensor:
    """RMS or layer normalisation over the last axis, without gain."""
    import torch

    if norm == "layer":
        hidden_TD = hidden_TD - hidden_TD.mean(-1, keepdim=True)
    return hidden_TD * torch.rsqrt(hidden_TD.square().mean(-1, keepdim=True) + eps)
