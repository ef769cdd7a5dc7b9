"""Skip, enter and leave at any block: passes through the twin of a model, whose blocks do what a ``Run`` says.

Blocks below ``lo`` do not run: they give what was stored of them, or pass their input through, and ``Reached`` leaves the
decoder's own forward as soon as block ``hi - 1`` has run. Of a looped model the same module is block after block: a block's
number is that of the call in a pass. Masks, rotary tables, embedding scales and caches stay the business of transformers, so
no family needs code of its own. What hangs on a block, such as a steering hook, belongs to the block.

Modules whose memory cannot be cut may be asked for the rows of a pass piece by piece, so that their state between two pieces
can be kept.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import cache_utils


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
    passed by. ``pieces`` are where the rows are cut for modules that take them piece by piece; ``between`` is given the block's
    number and the piece's end. ``shared`` gives the keys and values that a skipped block wrote and later ones read."""

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
    pieces: Sequence[int] = ()
    between: Callable[[int, int], object] = lambda i, end: None
    shared: Callable[[int], tuple[Tensor, Tensor]] | None = None
    calls: int = 0


class Steps:
    """What the blocks do; one pass at a time, since modules keep things of the pass that they are in (rotary tables, weights
    that were fetched for it)."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.outputs = [0] * len(blocks)  # how many a block gives in a tuple; 0: the state alone
        self.form: Any = None  # how what a block gives becomes rows, where that is no [1, T, D] already
        self.shares: dict[int, Any] = {}  # blocks whose keys and values later ones read, with the name that they have there
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
            if i == len(self.outputs) - 1:
                run.skipped()
            if i in self.shares and run.shared is not None:
                _sharing(args, kwargs)[self.shares[i]] = run.shared(i)
            return self._passed_on(i, *self._outputs_of(run.given.get(i), hidden))
        known = dict(_sharing(args, kwargs)) if run.chain is not None else {}
        try:
            out = forward(*args, **kwargs)
        except Written:
            out = self._passed_on(i, hidden)
        if run.chain is not None:
            run.chain.append((i, hidden, out))
            for name, pair in _sharing(args, kwargs).items():
                if known.get(name) is not pair:
                    self.shares[i] = name
        if i in run.kept:
            run.outs[i] = self._rows_of(out)
        if i == run.hi - 1:
            run.before = self._rows_of(hidden)
            raise Reached
        return out

    def _outputs_of(self, given: Tensor | None, hidden: Tensor) -> list[Tensor]:
        if given is None or self.form is None:
            return [hidden if given is None else given]
        return self.form.outputs(given)  # type: ignore[no-any-return]

    def _rows_of(self, out: Any) -> Tensor:
        if self.form is not None:
            return self.form.rows(out)  # type: ignore[no-any-return]
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    def _passed_on(self, i: int, hidden: Tensor, *others: Tensor) -> Any:
        """What a block gives whose state this is; ``others`` stand where ``form`` says."""
        if not self.outputs[i]:
            return hidden
        places = {} if self.form is None else dict(zip(self.form.places, others, strict=False))
        return (hidden, *(places.get(place) for place in range(1, self.outputs[i])))

    def take_apart(self, modules: Sequence[nn.Module]) -> None:
        """Have these take their rows piece by piece where a pass has pieces."""
        for module in modules:
            kind: Any = type(module)
            module.__class__ = _steered(kind, "in_pieces")
            vars(module)["_adi"] = self

    def in_pieces(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same outputs as of one call, from one call a piece."""
        if (run := self._run) is None or not run.pieces:
            return forward(*args, **kwargs)
        outs, start = [], 0
        for end in run.pieces:
            rows = functools.partial(_rows, start, end, run.pieces[-1])
            outs.append(forward(*tree_map(rows, args), **tree_map(rows, kwargs)))
            run.between(self.at, end)
            start = end
        return tuple(map(_glued, zip(*outs, strict=True))) if isinstance(outs[0], tuple) else _glued(outs)


@functools.cache
def _steered(kind: Any, asked: str = "step") -> type[nn.Module]:
    """The same kind of module, which asks ``Steps`` what to do when it is called."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(vars(self)["_adi"], asked)(functools.partial(kind.__call__, self), args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _rows(start: int, end: int, rows: int, given: Any) -> Any:
    """Of a tensor of all rows of a pass, ``[B, T, ...]``, those of a piece."""
    if not isinstance(given, Tensor):
        return given
    if given.dim() not in (2, 3) or given.shape[1] != rows:
        raise TypeError(f"an input of shape {list(given.shape)} has no axis of {rows} rows")
    return given[:, start:end]


def _glued(outs: Sequence[Any]) -> Any:
    return torch.cat(list(outs), 1) if isinstance(outs[0], Tensor) else outs[-1]


def _sharing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where the blocks of a pass leave keys and values for each other."""
    kind = getattr(cache_utils, "KVSharingDict", ())
    return next((given for given in (*args, *kwargs.values()) if isinstance(given, kind)), {})


def _keep_mlp(run: Run, args: tuple[Any, ...]) -> None:
    run.mlp = args[0]
