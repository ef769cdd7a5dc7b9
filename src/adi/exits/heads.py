"""Light exit heads: a low-rank adapter where the final norm stands, and a shortlist instead of the vocabulary.

``logits_S = scale * W_S (I + U V^T) norm(h) + b_S`` and one more output for everything outside the shortlist, the learned
tail. ``W_S`` are rows of the model's own head, so a head adds only its adapter. Early-exit heads: BranchyNet (Teerapittayanon
et al. 2016); low-rank translators of middle states: the tuned lens (Belrose et al. 2023); shortlists with a tail class: Grave
et al. 2017 (adaptive softmax).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from adi.exits import signals
from adi.exits.signals import HeadRows, Prediction
from adi.model.arrays import Array, as_array, as_tensor, digest, normalise
from adi.model.backbone import Backbone, ReadOut, States, TensorFunction, raw_of

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
    size: int
    vocabulary: int

    def with_tail(self, tail_D: Tensor, tail_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and biases of one more row, the tail's: ``[S + 1, D]`` and ``[S + 1]``."""
        import torch

        bias_S = self.weight_SD.new_zeros(self.size) if self.bias_S is None else self.bias_S
        return torch.cat([self.weight_SD, tail_D[None]]), torch.cat([bias_S, tail_bias])

    def prediction(self, x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor) -> Prediction:
        """What the rows ``with_tail`` make of normed states."""
        import torch

        logs_TN = torch.nn.functional.linear(x_TD, weight_ND, bias_N).log_softmax(-1)
        return Prediction(logs_TN[:, : self.size], self.ids_S, logs_TN[:, self.size], self.vocabulary - self.size)


def shortlist(readout: ReadOut, ids_S: Array) -> Shortlist:
    """Cut a model's read-out down to the tokens ``ids_S``; its logit scale goes into the rows. Of arrays come arrays."""
    weight_VD = readout.weight_VD
    ids_S = as_array(ids_S) if isinstance(weight_VD, np.ndarray) else as_tensor(ids_S).to(weight_VD.device)
    bias_S = None if readout.bias_V is None else readout.scale * readout.bias_V[ids_S]
    weight_SD = readout.scale * readout.weight_VD[ids_S]
    return Shortlist(ids_S, weight_SD, bias_S, readout.norm, readout.eps, len(ids_S), len(weight_VD))


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
    x_TD = adapted(adapter, hidden_TD, among.norm, among.eps)
    return among.prediction(x_TD, *among.with_tail(adapter.tail_D, adapter.tail_bias))


def head_function(adapter: Adapter, readout: ReadOut, ids_S: Array) -> TensorFunction:
    """``predict`` as an engine compiles it, on the device of the model's own head: states to the rows of the ``Prediction`` and
    all of its log-probabilities."""
    readout = readout.tensors()
    among, device = shortlist(readout, ids_S), readout.weight_VD.device
    moved = Adapter(**{name: tensor.to(device) for name, tensor in adapter.tensors().items()})
    rows = among.with_tail(moved.tail_D, moved.tail_bias)

    def run(hidden_TD: Tensor) -> tuple[Tensor, ...]:
        head = among.prediction(adapted(moved, hidden_TD, among.norm, among.eps), *rows)
        return (*head.rows, head.log_probs_TS)

    return run


class ExitHead:
    """A head at work beside one model, as a function of its engine. Holds no sequence's state."""

    def __init__(self, adapter: Adapter, ids_S: Array, backbone: Backbone) -> None:
        readout = backbone.readout()
        name = f"exit-{digest([*vars(adapter).values(), ids_S], __file__, signals.__file__)}"
        self._run = backbone.compile(name, lambda: head_function(adapter, readout, ids_S), [backbone.spec.width])
        self._ids_S, self._outside = ids_S, backbone.spec.vocabulary - len(ids_S)

    def __call__(self, states: States | Tensor) -> Prediction:
        *rows, log_probs_TS = (as_tensor(array) for array in self._run(raw_of(states)))
        ids_S = as_tensor(self._ids_S).to(log_probs_TS.device)
        return Prediction(log_probs_TS, ids_S, rows[3], self._outside, HeadRows(*rows))
