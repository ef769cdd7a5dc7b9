"""Heads, drafter and answers out of a file's arrays; ValueError for what cannot be theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from adi.drafters.datastore import Datastore
from adi.drafters.network import Drafter, shapes
from adi.errors import AdiError
from adi.exits.heads import Adapter, Heads

FLOATS = (np.float16, np.float32, np.float64)


def finite(array: Any, shape: tuple[int, ...]) -> bool:
    """Whether an array holds numbers of this shape, all finite in float32, in which they will be used."""
    if array.shape != shape or array.dtype.type not in FLOATS:
        return False
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(np.float32)).all())


def answers_of(vocabulary: int, arrays: Mapping[str, Any]) -> Datastore | None:
    own = {name.removeprefix("answers."): a for name, a in arrays.items() if name.startswith("answers.")}
    if not own:
        return None
    if set(own) != {"ids_N", "lengths_M"}:
        raise AdiError(f"the answers' tensors are {sorted(own)}, not ids_N and lengths_M")
    answers = Datastore(**own)
    answers.check(vocabulary)
    return answers


def drafter_of(width: int, vocabulary: int, arrays: Mapping[str, Any]) -> Drafter | None:
    own = {name.removeprefix("drafter."): a for name, a in arrays.items() if name.startswith("drafter.")}
    if not own:
        return None
    hidden = own["gate_FD"].shape[0] if "gate_FD" in own and own["gate_FD"].ndim == 2 else 0
    wanted = shapes(width, hidden)
    if set(own) != {*wanted, "ids_S"}:
        raise AdiError(f"the drafter's tensors are {sorted(own)}, not {sorted((*wanted, 'ids_S'))}")
    _check_ids(own["ids_S"], vocabulary)
    for name, shape in wanted.items():
        if not finite(own[name], shape):
            raise AdiError(f"the drafter's {name}: shape {tuple(own[name].shape)} or values are not what they must be")
    return Drafter(ids_S=own.pop("ids_S").astype(np.int64), **{name: a.astype(np.float32) for name, a in own.items()})


def _check_ids(ids_S: Any, vocabulary: int) -> None:
    if ids_S is None or ids_S.ndim != 1 or ids_S.dtype != np.int32 or ids_S.size == 0:
        raise AdiError("the shortlist ids_S is missing or has another form")
    if int(ids_S.min()) < 0 or int(ids_S.max()) >= vocabulary or len(np.unique(ids_S)) != len(ids_S):
        raise AdiError(f"the shortlist holds ids twice or outside the vocabulary [0, {vocabulary})")


def heads_of(depths: list[int], width: int, vocabulary: int, arrays: dict[str, Any]) -> Heads:
    ids_S = arrays.pop("ids_S", None)
    _check_ids(ids_S, vocabulary)
    assert ids_S is not None
    adapters = {}
    for depth in depths:
        parts = {f.name: arrays.pop(f"{depth}.{f.name}", None) for f in fields(Adapter)}
        if missing := [name for name, a in parts.items() if a is None]:
            raise AdiError(f"depth {depth} lacks {', '.join(missing)}")
        rank = parts["up_DR"].shape[-1] if parts["up_DR"].ndim == 2 else 0
        shapes = {"gain_D": (width,), "shift_D": (width,), "up_DR": (width, rank), "down_DR": (width, rank)}
        shapes |= {"tail_D": (width,), "tail_bias": (1,)}
        for name, array in parts.items():
            if not finite(array, shapes[name]):
                raise AdiError(f"depth {depth}, {name}: shape {array.shape} or values are not what they must be")
        adapters[depth] = Adapter(**{name: array.astype(np.float32) for name, array in parts.items()})
    if arrays:
        raise AdiError(f"unknown tensors {sorted(arrays)[:3]}")
    return Heads(ids_S.astype(np.int64), adapters)
