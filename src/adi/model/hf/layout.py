"""What is stored where a pass of a looped model stops: found by watching which block reads what other blocks gave.

A block is a call in a pass. To go on at block ``to`` the model's own forward runs with all calls below it skipped; those whose
outputs are read later give what was stored of them. What lies between blocks (embeddings, sums of states, injections) is
worked out anew. In a stack of blocks only the last call is read later; a looped model may also read what its prelude gave
(Huginn) or the state of another stack (HRM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves

from adi.model.arrays import as_tensor
from adi.model.backbone import Loop, States, raw_of
from adi.model.hf.passes import Run


@dataclass(frozen=True)
class Form:
    """How what a block gives becomes rows, one a token, and back: its state, whatever its axes, and beside it other outputs
    that the next block reads. ``axes`` and ``shapes`` are of each of them, without positions; ``places`` of the others in the
    block's tuple."""

    axes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    places: tuple[int, ...] = ()

    @classmethod
    def of(cls, long: Sequence[tuple[int, Any, Any]], short: Sequence[tuple[int, Any, Any]], places: Sequence[int]) -> Form:
        """By what blocks gave in passes over two numbers of tokens. ValueError where some output has no place for tokens."""
        found = []
        for one, other in zip(cls._outputs(long, places), cls._outputs(short, places), strict=True):
            differ = [axis for axis, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b]
            if len(differ) != 1 or not one.is_floating_point():
                raise ValueError(f"what goes from block to block has the shape {list(one.shape)}, and not a row for each token")
            found.append((differ[0], (*one.shape[: differ[0]], *one.shape[differ[0] + 1 :]), one.dtype))
        axes, shapes, dtypes = zip(*found, strict=True)
        return cls(axes, shapes, dtypes, tuple(places))

    @staticmethod
    def _outputs(chain: Sequence[tuple[int, Any, Any]], places: Sequence[int]) -> list[Tensor]:
        _, _, out = chain[0]
        return [state_of(out), *(out[place] for place in places)]

    def rows(self, out: Any) -> Tensor:
        """``[1, T, width]`` of what a block gave, or of a state alone."""
        parts = [state_of(out), *(out[place] for place in self.places if isinstance(out, tuple))]
        flat = [part.movedim(axis, 0).flatten(1) for part, axis in zip(parts, self.axes, strict=False)]
        return torch.cat(flat, -1)[None] if len(flat) > 1 else flat[0][None]

    def outputs(self, rows_BTD: Tensor) -> list[Tensor]:
        """The state and the others again, of as many of them as the rows hold."""
        found, start = [], 0
        for axis, shape, dtype in zip(self.axes, self.shapes, self.dtypes, strict=True):
            columns = rows_BTD[0, :, start : start + math.prod(shape)]
            if columns.shape[-1]:
                found.append(columns.unflatten(-1, shape).movedim(0, axis).to(dtype))
            start += math.prod(shape)
        return found

    @property
    def width(self) -> int:
        """Of a row."""
        return sum(map(math.prod, self.shapes))


@dataclass(frozen=True)
class StateLayout:
    """``at[d]``: the calls whose outputs, side by side, are the state after ``d`` blocks; first what a head can read.

    ``kinds`` has the same number for calls of the same module, ``sizes`` the width of each call's output.
    """

    at: Sequence[tuple[int, ...]]
    kinds: Sequence[int]
    sizes: Sequence[int]

    @classmethod
    def of_stack(cls, layers: int, width: int) -> StateLayout:
        """Of a stack in which each block takes what the one before it gave: only that is stored."""
        return cls([(), *((i,) for i in range(layers))], range(layers), [width] * layers)

    def joined(self, outs_BTD: Mapping[int, Tensor], depth: int) -> Tensor:
        """The state after ``depth`` blocks, ``[B, T, sum of sizes]``."""
        parts = [outs_BTD[call] for call in self.at[depth]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def parts(self, states: States | Tensor, to: int) -> dict[int, Tensor]:
        """What calls below ``to`` give, as block ``to`` and those after it read it, ``[1, T, D]`` each.

        States that stopped elsewhere give what the same modules gave last; a tensor may lack what stands behind the part that
        a head reads.
        """
        depth = to if not isinstance(states, States) or states.depth is None else states.depth
        calls, raw_BTD = self.at[depth], as_tensor(raw_of(states))[None]
        sizes = [self.sizes[call] for call in calls]
        have = dict(zip(calls, _as_wide(raw_BTD, sum(sizes)).split(sizes, -1), strict=True))
        return {call: _as_wide(have[self._like(call, calls)], self.sizes[call]) for call in self.at[to]}

    def _like(self, call: int, calls: Sequence[int]) -> int:
        """The call itself, or the last one of the same module; the one that a head reads where there is none."""
        alike = (one for one in calls if self.kinds[one] == self.kinds[call])
        return call if call in calls else max(alike, default=calls[0])


def _as_wide(state_BTD: Tensor, width: int) -> Tensor:
    return pad(state_BTD, (0, width - state_BTD.shape[-1])) if state_BTD.shape[-1] != width else state_BTD


def watched_layout(kinds: Sequence[int], outs: Mapping[int, Tensor], dry: Callable[[Run], Tensor]) -> StateLayout:
    """The layout of a looped model. ``dry(run)`` gives the logits of its forward with every block skipped: what call ``j``
    gives is made NaN, and shows in the inputs of the calls that read it."""
    layers, last_read = len(kinds), []
    for j in range(layers):
        readers = [j]

        def note(i: int, given: Any, readers: list[int] = readers) -> None:
            if _holds_nan(given):
                readers.append(i)

        if _holds_nan(dry(Run(layers, layers + 1, {**outs, j: torch.full_like(outs[j], torch.nan)}, entered=note))):
            readers.append(layers)
        last_read.append(max(readers))

    def order(call: int) -> tuple[bool, int]:
        return kinds[call] == kinds[-1], call

    at = [tuple(sorted((j for j in range(d) if last_read[j] >= d), key=order, reverse=True)) for d in range(layers + 1)]
    newest = [calls or ((d - 1,) if d else ()) for d, calls in enumerate(at)]
    return StateLayout(newest, kinds, [outs[i].shape[-1] for i in range(layers)])


def _holds_nan(given: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_floating_point() and bool(x.isnan().any()) for x in tree_leaves(given))


def state_of(out: Any) -> Any:
    """Of what a block gives, the state."""
    return out[0] if isinstance(out, tuple) else out


def kinds_of(blocks: Sequence[nn.Module]) -> list[int]:
    """The same number for calls of the same module."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(id(block), len(numbers)) for block in blocks]


def loop_of(kinds: Sequence[int]) -> Loop | None:
    """The calls that run again and again, as many as one loop holds; None where no module runs twice."""
    found: Loop | None = None
    for first in range(len(kinds)):
        for period in range(1, (len(kinds) - first) // 2 + 1):
            turns = 1
            while kinds[first : first + period] == kinds[first + turns * period : first + (turns + 1) * period]:
                turns += 1
            if turns > 1 and (found is None or period * turns > found.period * found.turns):
                found = Loop(first, period, turns)
    if found is None or found.period == 1:
        return found
    return replace(found, inner=loop_of(kinds[found.first : found.first + found.period]))
