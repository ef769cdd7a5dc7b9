"""A twin of a user's model: modules of our own that share its weights, so that nothing done to them shows in the model.

What hangs on a module hangs on its twin too: hooks, forwards that were put on the instance (accelerate), adapters. Copied are
only dictionaries and small rotary tables, never weights. A model or block under ``torch.compile`` has the twin of what was
compiled.
"""

from __future__ import annotations

import copy
import functools
import operator
import types
from typing import Any

import torch
from torch import nn

IDLE = ("_state_dict", "_load_state_dict", "_backward", "_is_full_backward")  # what no forward reads
HOLDERS = (nn.Module, types.MethodType, types.FunctionType, functools.partial)
CONTAINERS = (dict, list, set)  # and what derives from them: ordered dictionaries of hooks


class Twin:
    """``model`` is the twin; ``changed`` says whether the model it was made from has become another since."""

    def __init__(self, model: Any) -> None:
        self._made: dict[int, tuple[Any, Any]] = {}
        self._states: list[tuple[Any, dict[str, Any], int]] = []
        self._maps: dict[int, Any] = {}  # accelerate's, one for many hooks
        self.model = self._copied(model)
        for _, twin in list(self._made.values()):
            if not isinstance(twin, torch.jit.ScriptModule):
                for name, value in vars(twin).items():
                    vars(twin)[name] = self._of_twin(value)
                _forget_length(twin)
        self._made.clear()

    def changed(self, only: tuple[str, ...] = ()) -> bool:
        """Whether modules, weights, buffers, hooks or switches are other ones than they were; weights' values are not read."""
        for module, then, size in self._states:
            now = vars(module)
            if any(not _same(then.get(name), now.get(name)) for name in only or then) or len(now) != size:
                return True
        return False

    def _copied(self, module: Any) -> Any:
        module = module._modules.get("_orig_mod", module)
        if id(module) in self._made:
            return self._made[id(module)][1]
        if isinstance(module, torch.jit.ScriptModule):
            self._made[id(module)] = module, module
            return module
        twin = object.__new__(type(module))
        self._made[id(module)] = module, twin
        state = {name: v.copy() if isinstance(v, CONTAINERS) else v for name, v in list(vars(module).items())}
        watched = {name: v for name, v in state.items() if not name.startswith(IDLE)}
        self._states.append((module, watched, len(state)))
        vars(twin).update({name: v.copy() if isinstance(v, CONTAINERS) else v for name, v in state.items()})
        vars(twin)["_compiled_call_impl"] = None
        for name, child in twin._modules.items():
            twin._modules[name] = None if child is None else self._copied(child)
        return twin

    def _of_twin(self, value: Any) -> Any:
        """What refers to modules of the model refers to their twins."""
        if isinstance(value, nn.Module):
            return self._made.get(id(value), (None, value))[1]
        if isinstance(value, types.MethodType):
            return types.MethodType(self._of_twin(value.__func__), self._of_twin(value.__self__))
        if isinstance(value, types.FunctionType) and value.__closure__:
            return self._own_closure(value)
        if isinstance(value, functools.partial):
            return functools.partial(self._of_twin(value.func), *map(self._of_twin, value.args), **value.keywords)
        if type(value) in (list, tuple):
            return type(value)(map(self._of_twin, value))
        if type(value).__module__ == "accelerate.hooks":
            return self._own_hook(value)
        return value

    def _own_closure(self, function: Any) -> Any:
        """A forward that a trainer put on the model holds the one that was there before."""
        if id(function) in self._made:
            return self._made[id(function)][1]
        self._made[id(function)] = function, function  # where it holds itself
        cells = tuple(map(self._own_cell, function.__closure__))
        if all(map(operator.is_, cells, function.__closure__)):
            return function
        code, names, defaults = function.__code__, function.__globals__, function.__defaults__
        made = types.FunctionType(code, names, function.__name__, defaults, cells)
        made.__kwdefaults__ = function.__kwdefaults__
        self._made[id(function)] = function, functools.update_wrapper(made, function)
        return made

    def _own_cell(self, cell: Any) -> Any:
        held = cell.cell_contents if cell != types.CellType() else None
        own = self._of_twin(held) if isinstance(held, HOLDERS) else held
        return cell if own is held or (isinstance(held, types.MethodType) and own == held) else types.CellType(own)

    def _own_hook(self, hook: Any) -> Any:
        """accelerate's hooks note what they have moved, which two threads must not do in one place."""
        own = copy.copy(hook)
        if hasattr(hook, "hooks"):
            own.hooks = [self._own_hook(inner) for inner in hook.hooks]
        if (moved := getattr(hook, "tied_params_map", None)) is not None:
            own.tied_params_map = self._maps.setdefault(id(moved), {key: dict(places) for key, places in moved.items()})
        return own


def _forget_length(module: Any) -> None:
    """Rotary tables of a module's own, and as they are before any text has made them longer."""
    for name in module._non_persistent_buffers_set:
        if (buffer := module._buffers.get(name)) is not None and buffer.dim() == 1:
            module._buffers[name] = module._buffers.get(name.replace("inv_freq", "original_inv_freq"), buffer).clone()
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, getattr(module, "original_max_seq_len", getattr(module, name)))


def _same(then: Any, now: Any) -> bool:
    if then is now or (isinstance(then, CONTAINERS) and not then and not now):
        return True
    if type(then) is not type(now):
        return False
    if isinstance(then, dict):
        return len(then) == len(now) and all(key in now and _same(value, now[key]) for key, value in list(then.items()))
    if isinstance(then, (list, tuple)):
        return len(then) == len(now) and all(map(_same, then, now))
    return isinstance(then, (bool, int, float, str, set)) and bool(then == now)
