"""Cache layers that cannot be cut to a length: linear attention, state-space models, short convolutions, compressors.

What such a layer holds is a function of all tokens so far. To go back it is put where it stood at the end of an earlier pass,
and what was accepted since then is run again, in front of the next rows (``replay``). Nothing here knows a kind of layer: a
snapshot is whatever the layer's attributes hold.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import LinearAttentionLayer

KEPT = 16  # snapshots of one layer; more than a round drafts
COLUMNS = 64  # inputs of a short convolution that are kept before its kernel's


class RecordedLayer(LinearAttentionLayer):  # type: ignore[misc]
    """A linear layer that keeps past inputs of its convolution and shows it no more of them than its kernel reads."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        full: Tensor = super().update_conv_state(conv_states, state_idx, **kwargs)
        return full[..., -(self.conv_kernel_size[state_idx] + conv_states.shape[-1]) :]


class Held:
    """Snapshots of one layer at the positions to which it may be put. ``apart`` are attributes that are cut and not held."""

    def __init__(self, layer: Any, apart: frozenset[str] = frozenset()) -> None:
        self.layer, self._apart, self.position = layer, apart, 0
        self._empty = self._copy()
        self._at: dict[int, dict[str, Any]] = {}

    def positions(self) -> set[int]:
        """Where it can be put."""
        return {0, self.position, *self._at}

    def can(self, position: int) -> bool:
        """Whether it can be put there."""
        return position in self.positions()

    def go(self, position: int) -> None:
        """Stand there, and be able to come back there."""
        if position != self.position:
            state, now = self._empty if position == 0 else self._at[position], vars(self.layer)
            for name in now.keys() - state.keys() - self._apart:
                del now[name]
            now.update({name: _copied(value) for name, value in state.items()})
            self.position = position
        elif position and position not in self._at:
            self.settle(position, keep=True)

    def settle(self, position: int, keep: bool = False) -> None:
        """It stands there after a pass or part of one; ``keep``: be able to come back."""
        self.position = position
        if keep:
            self._at[position] = self._copy()
            for old in sorted(self._at)[1 : 1 - KEPT]:  # the oldest is where the text was last verified
                del self._at[old]

    def forget(self, start: int, end: int) -> None:
        """Drop what is kept before ``start``, where nobody will go, and from ``end`` on, which belongs to other tokens."""
        self._at = {at: state for at, state in self._at.items() if start <= at < end}

    def _copy(self) -> dict[str, Any]:
        return {name: _copied(value) for name, value in vars(self.layer).items() if name not in self._apart}

    @property
    def bytes(self) -> int:
        """What its snapshots take, and the layer itself."""
        return sum(map(_size, [*self._at.values(), {n: v for n, v in vars(self.layer).items() if n not in self._apart}]))


class HeldColumns(Held):
    """A layer of short convolutions alone: its state is the newest inputs, so going back is a cut as long as they are kept."""

    def can(self, position: int) -> bool:
        widths = [(history.shape[-1], self.layer.conv_kernel_size[i]) for i, history in self._histories()]
        back = self.position - position
        return position == 0 or all(width == self.position or width - back >= kernel for width, kernel in widths)

    def positions(self) -> set[int]:
        return {0, self.position}

    def go(self, position: int) -> None:
        for i, history in self._histories():
            if position == 0:
                self.layer.has_previous_state[i] = False
            elif position < self.position:
                self.layer.conv_states[i] = history[..., : position - self.position]
        self.position = position

    def settle(self, position: int, keep: bool = False) -> None:
        self.position = position
        for i, history in self._histories():
            least = self.layer.conv_kernel_size[i] + COLUMNS
            if history.shape[-1] > 2 * least:
                self.layer.conv_states[i] = history[..., -least:].clone()

    def _histories(self) -> list[tuple[int, Tensor]]:
        layer = self.layer
        return [(i, history) for i, history in layer.conv_states.items() if history is not None and layer.has_previous_state[i]]


def after_first_pass(held: Held) -> Held:
    """How a layer is held, seen by what it keeps."""
    layer = held.layer
    if not isinstance(layer, RecordedLayer) or not layer.record_past:
        return held
    if not any(layer.is_recurrent_states_initialized.values()):
        columns = HeldColumns(layer, held._apart)
        columns.settle(held.position)
        return columns
    layer.record_past = False  # of a recurrent layer what its convolution reads next is all that is of use
    for i, history in layer.conv_states.items():
        if history is not None:
            kernel = layer.conv_kernel_size[i]
            layer.conv_states[i] = pad(history, (kernel, 0))[..., -kernel:].clone()
    return held


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_size, inner))
