"""A model whose weights stay in 16 bits and which calculates in 32: what each module owns is widened while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NARROW = (torch.bfloat16, torch.float16)
MARK = "_adi_dtype"  # an empty parameter, which makes transformers see a model in float32


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Meanwhile the model is one in float32 to all that calls or traces it, and no more than one module's weights are there
    twice. A traced graph has them as they are stored, with a conversion behind each."""
    owners = [m for m in model.modules() if any(p is not None and p.dtype in NARROW for p in m._parameters.values())]
    handles = [owner.register_forward_pre_hook(_widen) for owner in owners]
    handles += [owner.register_forward_hook(_restore, always_call=True) for owner in owners]
    if owners:
        model.register_parameter(MARK, nn.Parameter(torch.zeros(0), requires_grad=False))
    try:
        yield
    finally:
        model._parameters.pop(MARK, None)
        for handle in handles:
            handle.remove()


def _widen(module: nn.Module, args: Any) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dtype in NARROW:
            module.__dict__[name] = parameter.float()  # found before the parameter of that name


def _restore(module: nn.Module, args: Any, out: Any) -> None:
    for name in module._parameters:
        module.__dict__.pop(name, None)
