"""Light exit heads: a low-rank adapter where the final norm stands, and a shortlist instead of the vocabulary.

``logits_S = scale * W_S (I + U V^T) norm(h) + b_S`` and one more output for everything outside the shortlist, the learned
tail. ``W_S`` are rows of the model's own head, so a head adds only its adapter, and ``merged`` folds that into a full matrix
for an ordinary checkpoint. Early-exit heads: BranchyNet (Teerapittayanon et al. 2016); low-rank translators of middle
states: the tuned lens (Belrose et al. 2023); shortlists with a tail class: Grave et al. 2017 (adaptive softmax).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from adi.exits.signals import Prediction
from adi.model.arrays import Array, as_array, as_tensor, normalise
from adi.model.backbone import LightHead, ReadOut

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Adapter:
    """What one depth adds: norm gain and shift ``[D]``, ``up_DR``, ``down_DR``, tail ``[D]`` and its bias ``[1]``.

    Arrays as a file gives them, or tensors.
    """

    gain_D: Array
    shift_D: Array
    up_DR: Array
    down_DR: Array
    tail_D: Array
    tail_bias: Array

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: as_tensor(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True)
class Heads:
    """The shortlist ``ids_S`` that all depths share, and an adapter for each depth."""

    ids_S: Array
    adapters: Mapping[int, Adapter]


@dataclass(frozen=True)
class Shortlist:
    """The rows of the model's own head that belong to a shortlist, and how to reach them from a state."""

    ids_S: Array
    weight_SD: Array
    bias_S: Array | None
    norm: str
    eps: float
    vocabulary: int


def shortlist(readout: ReadOut, ids_S: Array) -> Shortlist:
    """Cut a model's read-out down to the tokens ``ids_S``; its logit scale goes into the rows. Of arrays come arrays."""
    weight_VD = readout.weight_VD
    ids_S = as_array(ids_S) if isinstance(weight_VD, np.ndarray) else as_tensor(ids_S).to(weight_VD.device)
    bias_S = None if readout.bias_V is None else readout.scale * readout.bias_V[ids_S]
    weight_SD = readout.scale * readout.weight_VD[ids_S]
    return Shortlist(ids_S, weight_SD, bias_S, readout.norm, readout.eps, readout.weight_VD.shape[0])


def fresh_adapter(readout: ReadOut, rank: int, generator: torch.Generator) -> Adapter:
    """An adapter that changes nothing yet: the model's own norm, ``U = 0``, and no tail mass to speak of."""
    import torch

    readout = readout.tensors()
    width = readout.gain_D.shape[0]
    return Adapter(
        gain_D=readout.gain_D.clone(),
        shift_D=readout.shift_D.clone(),
        up_DR=torch.zeros(width, rank),
        down_DR=torch.randn(width, rank, generator=generator) / width**0.5,
        tail_D=torch.zeros(width),
        tail_bias=torch.zeros(1),
    )


def adapted(adapter: Adapter, hidden_TD: Tensor, norm: str, eps: float) -> Tensor:
    """``(I + U V^T) norm(h)``: the state as the model's own head would like to see it, ``[T, D]``."""
    x = normalise(hidden_TD.float(), norm, eps) * adapter.gain_D + adapter.shift_D
    x = x + (x @ adapter.down_DR) @ adapter.up_DR.T
    return as_tensor(x)


def predict(adapter: Adapter, among: Shortlist, hidden_TD: Tensor) -> Prediction:
    """The head's distribution over the shortlist and the tail, at T rows."""
    import torch

    x = adapted(adapter, hidden_TD, among.norm, among.eps)
    logits_TS = torch.nn.functional.linear(x, among.weight_SD, among.bias_S)
    tail_T = x @ adapter.tail_D + adapter.tail_bias
    total_T = torch.logaddexp(logits_TS.logsumexp(-1), tail_T)
    outside = among.vocabulary - among.ids_S.shape[0]
    return Prediction(logits_TS - total_T[:, None], among.ids_S, tail_T - total_T, outside)


def light_head(adapter: Adapter, among: Shortlist) -> LightHead:
    """The same head in plain parts, for an engine to compile."""
    return LightHead(
        norm=among.norm,
        eps=among.eps,
        gain_D=adapter.gain_D,
        shift_D=adapter.shift_D,
        down_DR=adapter.down_DR,
        up_DR=adapter.up_DR,
        weight_SD=among.weight_SD,
        bias_S=among.bias_S,
        tail_D=adapter.tail_D,
        tail_bias=adapter.tail_bias,
        outside=among.vocabulary - among.ids_S.shape[0],
    )


def merged(adapter: Adapter, readout: ReadOut) -> Tensor:
    """The full matrix ``scale * W (I + U V^T)``, ``[V, D]``: this head as an ordinary checkpoint's ``lm_head``.

    The checkpoint's final norm takes ``gain_D`` and, where it is a layer norm, ``shift_D`` (zero otherwise).
    """
    weight_VD = readout.scale * readout.tensors().weight_VD
    return as_tensor(weight_VD + (weight_VD @ adapter.up_DR) @ adapter.down_DR.T)
