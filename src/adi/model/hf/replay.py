"""Going back where memory cannot be cut: what was accepted since the nearest snapshot runs again, in front of the next rows.

So it costs rows and no pass. The modules that hold such memory take the rows in two pieces and keep their state between them;
where that gives other logits (``Way.APART``) what runs again is a pass of its own. Where a family's code carries no state into
several rows at once they are given one by one (``Way.SINGLY``).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from adi.model.backbone import Rows, States


class Way(enum.Enum):
    """How rows run whose memory cannot be cut."""

    FRONT = enum.auto()
    APART = enum.auto()
    SINGLY = enum.auto()


def with_front(model: Any, rows: Rows, lo: int, hi: int) -> Rows:
    """The rows with those before them that blocks ``[lo, hi)`` must run again; all are before ``rows.start``."""
    cache, start = rows.cache, rows.start
    base = cache.nearest(lo, hi, start)
    if base < start:
        ids = tuple(cache.text[base:start])
        front = Rows(cache, base, ids, None if lo == 0 else _entering(model, cache, lo, base, start))
        if model.way is Way.FRONT:
            rows = Rows(cache, base, ids + rows.ids, None if lo == 0 else _joined(front.states, rows.states))
        else:
            model.part(front, lo, hi)
    if lo == 0:
        cache.text[rows.start :] = rows.ids
    return rows


def _joined(front: Any, states: Any) -> States:
    return States.joined([front, states if isinstance(states, States) else States(states)])


def _entering(model: Any, cache: Any, lo: int, base: int, start: int) -> States:
    """What enters block ``lo`` at positions ``[base, start)``: kept, or worked out beside the text."""
    first, found = cache.reached.get(lo, (start, None))
    if found is not None and first <= base and first + len(found) >= start:
        states: States = found[base - first : start - first]
        return states
    return model.part(Rows(cache.below(lo), base, tuple(cache.text[base:start]), None), 0, lo)  # type: ignore[no-any-return]


def pieces(way: Way, start: int, front: int, rows: int) -> list[int]:
    """Where a pass of so many rows from ``start`` on is cut, the first ``front`` of which run again; none: nowhere."""
    if way is Way.SINGLY and rows > 1:
        whole = front if start == 0 else 0  # a text that begins needs no state
        return [*([whole] if whole else []), *range(whole + 1, rows + 1)] if start or front else []
    return [front, rows] if front else []


def holders(cache: Any, blocks: Sequence[nn.Module], run: Callable[[], object]) -> list[nn.Module]:
    """The modules that write the memory of layers that are held, in a pass: of each layer the innermost that does all of it.
    None of them at all where that would be a block, or where a layer is written in other ways."""
    stack: list[nn.Module] = []
    seen: dict[int, list[list[nn.Module]]] = {slot: [] for slot in cache.held}

    def noting(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            seen[layer_idx].append(list(stack))
            return plain(states, layer_idx, *args, **kwargs)

        return call

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        stack.pop()

    handles = []
    for block in {id(block): block for block in blocks}.values():
        for module in block.modules():
            handles.append(module.register_forward_pre_hook(lambda module, args: stack.append(module)))
            handles.append(module.register_forward_hook(leave))
    for name in ("update_conv_state", "update_recurrent_state"):
        setattr(cache, name, noting(getattr(cache, name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    found = [_innermost(stacks) for stacks in seen.values()]
    outer = {id(block) for block in blocks}
    return [] if any(m is None or id(m) in outer for m in found) else [m for m in found if m is not None]


def _innermost(stacks: Sequence[Sequence[nn.Module]]) -> nn.Module | None:
    common = [levels[0] for levels in zip(*stacks, strict=False) if all(level is levels[0] for level in levels)]
    return common[-1] if common else None
