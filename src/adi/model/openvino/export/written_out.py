"""Models that write out what others leave to transformers: attention as products, positions as a range.

Scores are followed from the product of queries and keys to that with values, whatever happens to them in between; what did
happen is then read off the numbers: a scale, a causal mask, a window, ALiBi (Press et al. 2022), or else a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adi.errors import ModelError

PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm")
MARK = "_adi_scores"
HIDDEN = -5e3  # scores below are of places that a mask hides
LOUD = 300.0  # the largest product of a query and a key
FIRST_ROWS = 8  # of those that are looked at
SAME = 1e-5  # of the largest score


@dataclass(frozen=True)
class AttentionScores:
    """Of queries ``[..., T, D]`` and transposed keys ``[..., D, T]``; ``seen`` is what softmax was given, once it was."""

    query: Tensor
    key: Tensor
    seen: Tensor | None = None


class AttentionProducts(TorchFunctionMode):
    """Meanwhile the product with values, over ``rows`` tokens, is what ``attend`` makes of queries, keys and values
    ``[1, heads, T, width]`` and of the scores that softmax was given. ``loud``: queries are so large meanwhile that a cap on
    scores is not mistaken for none."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], rows: int, loud: bool = False) -> None:
        super().__init__()
        self._attend, self._rows, self._loud = attend, rows, loud

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, tensors = getattr(func, "__name__", ""), [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        scores = next((found for tensor in tensors if (found := vars(tensor).get(MARK)) is not None), None)
        if name in PRODUCTS and scores is not None and scores.seen is not None:
            query, key, value = (x if x.dim() == 4 else x[None] for x in (scores.query, scores.key, tensors[-1]))
            out = self._attend(query, key.transpose(-1, -2), value, scores.seen)
            return out if tensors[-1].dim() == 4 else out[0]
        if name.startswith("scatter"):  # the tracer has none of True and False
            args = [int(arg) if isinstance(arg, bool) else arg for arg in args]
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or out.dim() < 3 or tuple(out.shape[-2:]) != (self._rows, self._rows):
            return out
        if name in PRODUCTS:
            query, key = tensors[-2:]
            if self._loud:
                louder = query * (LOUD / out.abs().max().clamp(min=1e-9))
                args, query = [louder if arg is query else arg for arg in args], louder
                out = func(*args, **{name: louder if arg is tensors[-2] else arg for name, arg in kwargs.items()})
            scores = AttentionScores(query, key)
        elif name == "softmax" and scores is not None:
            scores = replace(scores, seen=tensors[0])
        if scores is not None:
            vars(out)[MARK] = scores
        return out


def measured(query: Tensor, key: Tensor, seen: Tensor) -> tuple[float, int, tuple[float, ...]]:
    """Scale, window and slopes of ALiBi that make scores ``[..., T, T]`` of queries and keys ``[1, heads, T, D]``."""
    heads, rows = query.shape[1], query.shape[2]
    scores = seen.detach().reshape(heads, rows, rows)
    window = _window(scores > HIDDEN)
    chosen = sorted({*range(min(FIRST_ROWS, rows)), rows // 2, rows - 1})
    row, place = torch.tensor([(i, j) for i in chosen for j in range(max(0, i + 1 - (window or rows)), i + 1)]).T.contiguous()
    products = (query.detach()[0, :, row].double() * key.detach()[0].expand(heads, -1, -1)[:, place].double()).sum(-1)
    wanted, near = scores[:, row, place].double(), torch.searchsorted(torch.tensor(chosen), row)
    bias = torch.cat([place[:, None], torch.nn.functional.one_hot(near)], 1).double()  # a row's constant softmax does not see
    fitted = float(torch.linalg.lstsq(torch.cat([products[0, :, None], bias], 1), wanted[0, :, None]).solution[0])
    least = SAME * max(1.0, float(wanted.abs().max()))
    for scale in (query.shape[-1] ** -0.5, 1.0, fitted):
        rest = (wanted - scale * products).T
        found = torch.linalg.lstsq(bias, rest).solution
        if float((rest - bias @ found).abs().max()) <= least:
            return scale, window, tuple(found[0].tolist()) if float(found[0].abs().max()) * rows > least else ()
    raise ModelError(f"its attention scores over {rows} tokens are not the scaled products of queries and keys")


def _window(shown: Tensor) -> int:
    """The window of a causal mask ``[heads, T, T]``, 0 where it has none."""
    rows = shown.shape[-1]
    count = int(shown[0, -1].sum())
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    if not torch.equal(shown, (causal & ~causal.tril(-count)).expand_as(shown)):
        raise ModelError(f"its attention takes a mask of its own making: of {rows} tokens the last sees {count}")
    return count if count < rows else 0


@contextmanager
def plain_functions() -> Iterator[None]:
    """Meanwhile autograd functions are their forward where no gradient is wanted, which the tracer can follow."""
    kept = torch.autograd.Function.__dict__["apply"]

    def apply(kind: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            return kept.__get__(None, kind)(*args)
        return kind.forward(SimpleNamespace(save_for_backward=lambda *_: None), *args)

    with patch.object(torch.autograd.Function, "apply", classmethod(apply)):
        yield


class Positions(TorchFunctionMode):
    """Meanwhile what numbers the rows of a pass numbers them as ``position_ids [1, T]`` do."""

    def __init__(self, position_ids: Tensor) -> None:
        super().__init__()
        self._positions = position_ids

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        rows = self._positions.shape[1]
        if func is torch.arange and out.shape == (rows,) and out.tolist() == list(range(rows)):
            return self._positions[0].to(out.dtype)
        return out
