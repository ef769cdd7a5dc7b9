"""Skip and inject on a model's own blocks: the only place that knows how foreign decoders are built.

Inside ``patched`` every block's ``forward`` is replaced on the instance, and put back on the way out, error or not:
blocks below ``lo`` pass their input through, block ``lo`` gets the stored state instead of its input, and ``Reached``
leaves the model's own forward as soon as block ``hi - 1`` has run. Masks, rotary tables, embedding scales and caches
stay the business of transformers, so no family needs code of its own.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from adi.errors import AdiError


class Reached(Exception):  # noqa: N818 - not an error: it leaves a forward early
    """Block ``hi - 1`` is done; nothing after it shall run."""


class Written(Exception):  # noqa: N818
    """A block has written its keys and values, which is all that was wanted of it."""


@dataclass
class Run:
    """One pass through blocks ``[lo, hi)``; ``inject`` replaces what enters block ``lo``. Blocks that are left once they have
    written their keys and values (``Written``) pass on what entered them."""

    lo: int
    hi: int
    inject: Tensor | None
    hidden: Tensor | None = None
    before: Tensor | None = None
    mlp: Tensor | None = field(default=None)


def find_blocks(decoder: nn.Module, layers: int) -> list[nn.Module]:
    """The decoder's blocks: its only ``ModuleList`` with one entry a layer (the first, should there be several)."""
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not lists:
        raise AdiError(f"no list of {layers} blocks was found in {type(decoder).__name__}")
    return list(lists[0])


def find_down_projections(blocks: Sequence[nn.Module], width: int) -> list[nn.Module] | None:
    """Each block's MLP down projection: its one matrix, outside attention, that leads from more units than ``width`` to it.

    None when some block has none, several, or stacked experts: then MLP activations cannot be shown, and nothing is
    guessed.
    """
    found = []
    for block in blocks:
        attention = {id(inner) for m in block.modules() if m is not block and _attends(m) for inner in m.modules()}
        outside = [m for m in block.modules() if id(m) not in attention]
        downs = [m for m in outside if (shape := _matrix(m)) is not None and shape[0] > shape[1] == width]
        if len(downs) != 1 or any(_stacked(m) for m in outside):
            return None
        found.append(downs[0])
    return found


def _attends(module: nn.Module) -> bool:
    """Attention and its like: what keeps a memory of the past, under any of the names that transformers has for it."""
    return bool({"past_key_values", "past_key_value", "layer_past"} & set(inspect.signature(module.forward).parameters))


def _stacked(module: nn.Module) -> bool:
    """Experts keep their matrices stacked in tensors of three axes (so do convolutions, which are none)."""
    return not isinstance(module, nn.Conv1d) and any(p.dim() > 2 for p in module.parameters(recurse=False))


def _matrix(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear map, also of GPT-2's transposed ``Conv1D``."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    outputs, inputs = weight.shape
    return (outputs, inputs) if type(module).__name__ == "Conv1D" else (inputs, outputs)


class Patch:
    """The wrappers of one model's blocks, made once and put on only while a pass runs."""

    def __init__(self, blocks: Sequence[nn.Module], downs: Sequence[nn.Module] | None) -> None:
        self.blocks = list(blocks)
        self.downs = list(downs) if downs is not None else None
        self.extra_outputs = [0] * len(self.blocks)
        self._lock = threading.RLock()  # one pass at a time: the blocks are the model's own
        self._undo: Callable[[], object] = _undoing([])

    @contextmanager
    def patched(self, run: Run, *, mlp: bool = False) -> Iterator[Run]:
        """Blocks behave as ``run`` says until the context ends; then they are exactly what they were."""
        with self._lock, self._swapped(run, mlp):
            yield run

    @contextmanager
    def _swapped(self, run: Run, mlp: bool) -> Iterator[None]:
        self._undo()  # of a pass that was interrupted just where it would have been undone
        hook = None
        wrappers = [self._wrapper(i, block.forward, run) for i, block in enumerate(self.blocks)]
        self._undo = _undoing([block.__dict__ for block in self.blocks])
        try:
            for block, wrapper in zip(self.blocks, wrappers, strict=True):
                block.__dict__["forward"] = wrapper
            if mlp and self.downs is not None:
                hook = self.downs[run.hi - 1].register_forward_pre_hook(lambda _, args: _keep_mlp(run, args))
            yield
        except Reached:
            pass
        finally:
            self._undo()
            if hook is not None:
                hook.remove()

    def _wrapper(self, i: int, forward: Any, run: Run) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if i == run.lo and run.inject is not None:
                hidden = run.inject
            if i < run.lo:
                if i == len(self.blocks) - 1 and run.inject is not None:  # all blocks skipped: only the head runs
                    hidden = run.inject
                return (hidden, *[None] * self.extra_outputs[i]) if self.extra_outputs[i] else hidden
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs["hidden_states"] = hidden
            try:
                out = forward(*args, **kwargs)
            except Written:
                out = (hidden, *[None] * self.extra_outputs[i]) if self.extra_outputs[i] else hidden
            if i == run.hi - 1:
                run.before = hidden
                run.hidden = out[0] if isinstance(out, tuple) else out
                raise Reached
            return out

        return step


def _undoing(places: Sequence[dict[str, Any]]) -> Callable[[], object]:
    """A call, good for once, that puts every ``forward`` back as it is in these dictionaries now.

    One call into C and no Python between its steps, so that Ctrl-C cannot come half-way and leave a model half patched.
    """
    name = "forward"
    bare = [place for place in places if name not in place]
    own = [place for place in places if name in place]
    steps = itertools.chain(
        map(dict.pop, bare, itertools.repeat(name), itertools.repeat(None)),
        map(dict.__setitem__, own, itertools.repeat(name), [place[name] for place in own]),
    )
    return functools.partial(deque, steps, 0)


def _keep_mlp(run: Run, args: tuple[Any, ...]) -> None:
    run.mlp = args[0]
