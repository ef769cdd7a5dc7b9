"""Numbers as numpy arrays or as tensors.

Files and the compiled engine give arrays, so that decoding there needs no torch, whose import takes seconds; transformers'
modules and training use tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
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


def own_array(given: Array) -> Array:
    """An array that is no view of a file: those are slow to calculate with. Tensors stay what they are."""
    return np.array(given) if isinstance(given, np.ndarray) else given


def digest(arrays: Iterable[Array], *code: str) -> str:
    """16 hexadecimal digits that change with any number in these and with the text of these source files."""
    found = hashlib.blake2b(digest_size=8)
    for array in arrays:
        found.update(np.ascontiguousarray(as_array(array)).tobytes())
    for path in code:
        found.update(Path(path).read_bytes())
    return found.hexdigest()


def normalise(hidden_TD: Array, norm: str, eps: float) -> Array:
    """RMS ("rms") or layer normalisation over the last axis, without gain, of arrays and of tensors; "none": as they are."""
    if norm == "none":
        return hidden_TD
    if norm == "layer":
        hidden_TD = hidden_TD - hidden_TD.mean(-1, keepdims=True)
    return hidden_TD * ((hidden_TD * hidden_TD).mean(-1, keepdims=True) + eps) ** -0.5
