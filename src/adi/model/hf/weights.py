"""Where a model's weights lie and what they are, also of weights that are no plain tensors in memory."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from adi.errors import ModelError

SAMPLES = 4096


def device_of(model: Any) -> torch.device:
    """Where its inputs go: of offloaded weights that is where they are fetched to, not where they lie."""
    if model.device.type != "meta":
        return torch.device(model.device)
    for hook in itertools.chain(*_hooks(model).values()):
        if (device := getattr(hook, "execution_device", None)) is not None:
            return torch.device(device)
    raise ModelError(f"{type(model).__name__} has no weights yet: they are on the meta device; load them first.")


def fingerprint(model: Any) -> str:
    """A name for the weights: blake2b over names, shapes and 4,096 evenly spaced values of each tensor.

    Values are rounded to bfloat16 first, so float32 and bfloat16 weights of one model have one fingerprint. (float16
    loses small values that bfloat16 keeps, so ``load`` takes it before it converts.)
    """
    digest = hashlib.blake2b(digest_size=16)
    hooks = _hooks(model)
    for name, value in sorted(model.state_dict().items()):
        for inner, tensor in _plain(name, _fetched(name, value, hooks)):
            flat = tensor.detach().flatten()
            step = max(1, flat.numel() // SAMPLES)
            sample = flat[::step][:SAMPLES].to(device="cpu", dtype=torch.bfloat16)
            digest.update(f"{inner}{tuple(tensor.shape)}".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of an entry of a state: the parts of a quantised one."""
    if isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _plain(f"{name}.{i}", part)
    elif isinstance(value, Tensor) and value.is_quantized:
        yield name, value.dequantize()
    elif isinstance(value, Tensor) and type(value) not in (Tensor, torch.nn.Parameter) and hasattr(value, "__tensor_flatten__"):
        for part in value.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{part}", getattr(value, part))
    elif isinstance(value, Tensor):
        yield name, value


def _hooks(model: Any) -> dict[str, list[Any]]:
    """accelerate's hooks, by the names of their modules."""
    hooks = {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    return {name: list(getattr(hook, "hooks", [hook])) for name, hook in hooks.items()}


def _fetched(name: str, value: Any, hooks: dict[str, list[Any]]) -> Any:
    """The value itself, of an offloaded weight what the hook of its module fetches."""
    if not (isinstance(value, Tensor) and value.is_meta):
        return value
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        for hook in hooks.get(".".join(parts[:cut]), ()):
            with suppress(KeyError):
                if getattr(hook, "weights_map", None) is not None:
                    return hook.weights_map[".".join(parts[cut:])]
    raise ModelError(f"the weight {name} is on the meta device, and nothing says where it is kept; load the model whole.")
