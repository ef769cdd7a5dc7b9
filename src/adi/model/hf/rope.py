"""Rotary angles that depend on how long the text is: up to an edge they are one set, past it another (longrope).

A text past the edge is one that had the other angles from its first token on: transformers' ``generate`` reads it again when it
crosses. So do we: rows past the edge run on a second twin that always turns by the far angles, with KV memory of its own.
"""

from __future__ import annotations

import bisect
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adi.errors import ModelError
from adi.model.backbone import Rows

FEW = 4


def edge_of(model: Any, decoder: nn.Module, longest: int | None) -> int | None:
    """The length past which the decoder's rotary angles are others; None where they are the same up to ``longest``."""
    edges = []
    for angles in _angles(decoder, model):
        try:
            near = angles(FEW)
        except (TypeError, RuntimeError, IndexError, AttributeError):  # it is called in a way of its own
            continue
        if longest is None or longest <= FEW or _equal(angles(longest), near):
            continue
        edges.append(_last_like(near, angles, longest))
        angles(FEW)  # some keep what they computed last
    return min(edges, default=None)


def _last_like(near: list[Tensor], angles: Any, longest: int) -> int:
    """The longest text whose angles are still ``near``."""
    lengths = range(FEW, longest + 1)
    return lengths[bisect.bisect_left(lengths, True, key=lambda length: not _equal(angles(length), near))] - 1


def turns_again(model: Any, edge: int) -> bool:
    """Whether the model's own ``generate`` reads a text again when it crosses this edge."""
    code = inspect.getsource(type(model).prepare_inputs_for_generation)
    name = "original_max_position_embeddings"
    return name in code and getattr(model.config, name, None) == edge


def always_far(decoder: nn.Module, longest: int) -> None:
    """Turn by the angles of the longest text, however short the pass is."""
    for module in _rotary(decoder):
        vars(module)["forward"] = functools.partial(_far, module.forward, longest - 1)


def sides(rows: Rows, run: Any) -> Iterator[Rows]:
    """The rows before the edge, and those after it over their own KV memory, which ``run(rows)`` fills with what is before.

    A first pass that crosses the edge lies after it as a whole, as in the model's own forward.
    """
    cache, end = rows.cache, rows.start + len(rows.ids)
    if cache.model.far is None:
        yield rows
        return
    cache.ids[rows.start : end] = rows.ids
    if rows.start == 0 and rows.states is None:
        cache.edge = 0 if end > cache.model.edge else cache.model.edge
    near = max(0, min(end, cache.edge) - rows.start)
    if near:
        yield Rows(cache, rows.start, rows.ids[:near], None if rows.states is None else rows.states[:near])
    if near == len(rows.ids):
        return
    if cache.edge and not cache.model.turns_again:
        raise ModelError(
            f"{type(cache.model.model).__name__} has other rotary angles for texts of more than {cache.edge} tokens, and this "
            "text would cross that length on its way; keep prompt and answer within it, or begin with a longer prompt."
        )
    far, wanted = cache.far, cache.ids[: cache.edge]
    if far.ids != wanted:
        same = next((i for i, (a, b) in enumerate(zip(far.ids, wanted, strict=False)) if a != b), len(far.ids))
        run(Rows(far, same, tuple(wanted[same:]), None))
        far.ids = wanted
    yield Rows(far, rows.start + near, rows.ids[near:], None if rows.states is None else rows.states[near:])


def _rotary(decoder: nn.Module) -> list[nn.Module]:
    return [m for m in decoder.modules() if any("inv_freq" in name for name in m._buffers) and "position_ids" in _takes(m)]


def _takes(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _angles(decoder: nn.Module, model: Any) -> Iterator[Any]:
    """For each rotary module and type of block: the angles of the first positions in a text of so many tokens."""
    types = sorted(set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()))
    for module in _rotary(decoder):
        device, own = next(module.buffers()).device, getattr(module, "rope_type", None)
        kinds = sorted(own) if isinstance(own, dict) else types
        for kind in kinds if "layer_type" in _takes(module) else [None]:
            yield functools.partial(_first, module, device, {} if kind is None else {"layer_type": kind})


def _first(module: nn.Module, device: torch.device, kind: dict[str, Any], length: int) -> list[Tensor]:
    positions = torch.tensor([[*range(FEW), length - 1]], device=device)
    out = module(torch.zeros((1, FEW + 1, 1), device=device), position_ids=positions, **kind)
    return [part[..., :FEW, :] for part in (out if isinstance(out, tuple) else (out,))]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def _far(forward: Any, last: int, x: Tensor, position_ids: Tensor, *more: Any, **kind: Any) -> Any:
    out = forward(x, torch.cat([position_ids, torch.full_like(position_ids[..., :1], last)], -1), *more, **kind)
    return tuple(part[..., :-1, :] for part in out) if isinstance(out, tuple) else out[..., :-1, :]
