"""A decoder's blocks and their MLPs, found by what they are: no family's names are known here."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adi.errors import ModelError

MEMORY = frozenset({"past_key_values", "past_key_value", "layer_past", "cache_params"})


def find_blocks(decoder: nn.Module, layers: int) -> list[nn.Module]:
    """The decoder's blocks: its only ``ModuleList`` with one entry a layer (the first, should there be several); of a looped
    model the calls of the modules that run again and again, with what runs before and after them."""
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    calls = _watched(decoder)
    blocks = next((m for m in lists if m[0] in calls), next(iter(lists), None))  # another may be an image encoder's
    if blocks is not None and max(map(calls.count, blocks)) < 2:
        return list(blocks)
    own = [list(m) for m in decoder.children() if isinstance(m, nn.ModuleList)]
    if len(calls) == len(set(map(id, calls))) and calls not in own:  # else each block has several layers of attention
        raise ModelError(f"no list of {layers} blocks was found in {type(decoder).__name__}, and nothing runs again and again")
    return calls


@torch.no_grad()
def _watched(decoder: nn.Module) -> list[nn.Module]:
    """The outermost modules that turn a state into a state and are called more than once in a pass, or are blocks of a list
    beside them, in the order of their calls."""
    entered: list[nn.Module] = []
    calls: list[tuple[nn.Module, tuple[nn.Module, ...], bool]] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(module)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        entered.pop()
        given, state = args[0] if args else None, out[0] if isinstance(out, tuple) else out
        turns = isinstance(given, Tensor) and isinstance(state, Tensor) and given.shape == state.shape and given.dim() == 3
        calls.append((module, tuple(entered), turns))

    inner = [m for m in decoder.modules() if m is not decoder]
    handles = [m.register_forward_pre_hook(enter) for m in inner] + [m.register_forward_hook(leave) for m in inner]
    try:
        decoder(input_ids=torch.tensor([[0, 1]], device=next(decoder.parameters()).device), use_cache=False)
    except Exception:  # foreign code raises what it likes, and then nothing was found
        return []
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(id(module) for module, _, turns in calls if turns and _attending(module))
    again = {module for module, times in times.items() if times > 1}
    listed = {id(block) for m in decoder.modules() if isinstance(m, nn.ModuleList) for block in m} & times.keys()
    return [m for m, outer, _ in calls if id(m) in again | listed and not any(id(o) in again | listed for o in outer)]


def _attending(module: nn.Module) -> bool:
    return any(_attends(inner) for inner in module.modules())


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
    return bool(
        {"past_key_values", "past_key_value", "layer_past", "cache_params"} & set(inspect.signature(module.forward).parameters)
    )


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
