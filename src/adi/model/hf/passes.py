"""Skip, enter and leave at any block: passes through the twin of a model, whose blocks do what a ``Run`` says.

Blocks below ``lo`` do not run: they give what was stored of them, or pass their input through, and ``Reached`` leaves the
decoder's own forward as soon as block ``hi - 1`` has run. Of a looped model the same module is block after block: a block's
number is that of the call in a pass. Masks, rotary tables, embedding scales and caches stay the business of transformers, so
no family needs code of its own. What hangs on a block, such as a steering hook, belongs to the block.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


class Reached(Exception):  # noqa: N818 - not an error: it leaves a forward early
    """Block ``hi - 1`` is done; nothing after it shall run."""


class Written(Exception):  # noqa: N818
    """A block has written its keys and values, which is all that was wanted of it."""


@dataclass
class Run:
    """One pass through blocks ``[lo, hi)``; ``given`` are the outputs of blocks below ``lo`` that are read later. Those of
    ``kept`` go to ``outs``, what entered the last block to ``before``. Blocks that are left once they have written their keys
    and values (``Written``) pass on what entered them. ``chain``, where it is a list, is given each block's number, input and
    output; ``entered`` each block's number and all that it is called with, and ``skipped`` is called where the last block was
    passed by."""

    lo: int
    hi: int
    given: Mapping[int, Tensor] = field(default_factory=dict)
    kept: Container[int] = ()
    outs: dict[int, Tensor] = field(default_factory=dict)
    before: Tensor | None = None
    mlp: Tensor | None = None
    chain: list[tuple[int, Any, Any]] | None = None
    entered: Callable[[int, Any], object] = lambda i, given: None
    skipped: Callable[[], object] = lambda: None
    calls: int = 0


class Steps:
    """What the blocks do; one pass at a time, since modules keep things of the pass that they are in (rotary tables, weights
    that were fetched for it)."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.extra_outputs = [0] * len(blocks)
        self._lock = threading.RLock()
        self._run: Run | None = None
        for block in {id(block): block for block in blocks}.values():
            kind: Any = type(block)
            block.__class__ = _steered(kind)
            vars(block)["_adi"] = self

    @contextmanager
    def running(self, run: Run, down: nn.Module | None = None) -> Iterator[None]:
        """Blocks behave as ``run`` says until the context ends; what ``down`` is given is noted as ``run.mlp``."""
        with self._lock:
            outer, self._run = self._run, run
            hook = None if down is None else down.register_forward_pre_hook(lambda _, args: _keep_mlp(run, args))
            try:
                yield
            except Reached:
                pass
            finally:
                self._run = outer
                if hook is not None:
                    hook.remove()

    @property
    def at(self) -> int:
        """The number of the block that runs."""
        return 0 if self._run is None else self._run.calls - 1

    def step(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pass's next block is called; ``forward`` is what it would do by itself."""
        if (run := self._run) is None:
            return forward(*args, **kwargs)
        i, run.calls = run.calls, run.calls + 1
        hidden = args[0] if args else kwargs["hidden_states"]
        run.entered(i, (args, kwargs))
        if i < run.lo:
            if i == len(self.extra_outputs) - 1:
                run.skipped()
            return self._passed_on(i, run.given.get(i, hidden))
        try:
            out = forward(*args, **kwargs)
        except Written:
            out = self._passed_on(i, hidden)
        if run.chain is not None:
            run.chain.append((i, hidden, out))
        if i in run.kept:
            run.outs[i] = out[0] if isinstance(out, tuple) else out
        if i == run.hi - 1:
            run.before = hidden
            raise Reached
        return out

    def _passed_on(self, i: int, hidden: Tensor) -> Any:
        return (hidden, *[None] * self.extra_outputs[i]) if self.extra_outputs[i] else hidden


@functools.cache
def _steered(kind: Any) -> type[nn.Module]:
    """The same kind of block, which asks ``Steps`` what to do when it is called."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["_adi"].step(functools.partial(kind.__call__, self), args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _keep_mlp(run: Run, args: tuple[Any, ...]) -> None:
    run.mlp = args[0]
