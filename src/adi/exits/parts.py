"""Heads, drafter and answers out of a file's tensors; ValueError for what cannot be theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from adi.exits.answers import Answers
from adi.exits.drafter import Drafter, shapes
from adi.exits.heads import Adapter, Heads

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def finite(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds numbers of this shape, all finite in float32, in which they will be used."""
    return tuple(tensor.shape) == shape and tensor.dtype in FLOATS and bool(tensor.float().isfinite().all())


def answers_of(vocabulary: int, tensors: Mapping[str, Tensor]) -> Answers | None:
    own = {name.removeprefix("answers."): t for name, t in tensors.items() if name.startswith("answers.")}
    if not own:
        return None
    if set(own) != {"ids_N", "lengths_M"}:
        raise ValueError(f"the answers' tensors are {sorted(own)}, not ids_N and lengths_M")
    answers = Answers(**own)
    answers.check(vocabulary)
    return answers


def drafter_of(width: int, vocabulary: int, tensors: Mapping[str, Tensor]) -> Drafter | None:
    own = {name.removeprefix("drafter."): t for name, t in tensors.items() if name.startswith("drafter.")}
    if not own:
        return None
    hidden = own["gate_FD"].shape[0] if "gate_FD" in own and own["gate_FD"].dim() == 2 else 0
    wanted = shapes(width, hidden)
    if set(own) != {*wanted, "ids_S"}:
        raise ValueError(f"the drafter's tensors are {sorted(own)}, not {sorted((*wanted, 'ids_S'))}")
    _check_ids(own["ids_S"], vocabulary)
    for name, shape in wanted.items():
        if not finite(own[name], shape):
            raise ValueError(f"the drafter's {name}: shape {tuple(own[name].shape)} or values are not what they must be")
    return Drafter(ids_S=own.pop("ids_S").long(), **{name: tensor.float() for name, tensor in own.items()})


def _check_ids(ids_S: Tensor | None, vocabulary: int) -> None:
    if ids_S is None or ids_S.dim() != 1 or ids_S.dtype != torch.int32 or ids_S.numel() == 0:
        raise ValueError("the shortlist ids_S is missing or has another form")
    if int(ids_S.min()) < 0 or int(ids_S.max()) >= vocabulary or ids_S.unique().numel() != ids_S.numel():
        raise ValueError(f"the shortlist holds ids twice or outside the vocabulary [0, {vocabulary})")


def heads_of(depths: list[int], width: int, vocabulary: int, tensors: dict[str, Tensor]) -> Heads:
    ids_S = tensors.pop("ids_S", None)
    _check_ids(ids_S, vocabulary)
    assert ids_S is not None
    adapters = {}
    for depth in depths:
        parts = {f.name: tensors.pop(f"{depth}.{f.name}", None) for f in fields(Adapter)}
        if missing := [name for name, t in parts.items() if t is None]:
            raise ValueError(f"depth {depth} lacks {', '.join(missing)}")
        adapter = Adapter(**{name: t for name, t in parts.items() if t is not None})
        rank = adapter.up_DR.shape[-1] if adapter.up_DR.dim() == 2 else 0
        shapes = {"gain_D": (width,), "shift_D": (width,), "up_DR": (width, rank), "down_DR": (width, rank)}
        shapes |= {"tail_D": (width,), "tail_bias": (1,)}
        for name, tensor in adapter.tensors().items():
            if not finite(tensor, shapes[name]):
                raise ValueError(f"depth {depth}, {name}: shape {tuple(tensor.shape)} or values are not what they must be")
        adapters[depth] = Adapter(**{name: tensor.float() for name, tensor in adapter.tensors().items()})
    if tensors:
        raise ValueError(f"unknown tensors {sorted(tensors)[:3]}")
    return Heads(ids_S.long(), adapters)
