"""The gated MLP of a block with the norm before it, found by watching one pass; a drafter begins as a copy of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from adi.errors import AdiError
from adi.model.hf.readout import norm_of


def gated_mlp(block: nn.Module, down: nn.Module, run: Callable[[], object]) -> dict[str, Tensor] | None:
    """``gain_D``, ``gate_FD``, ``up_FD`` and ``down_DF`` of this block, None where it is built in another way.

    ``down`` is its down projection, ``run`` makes one pass through the block. The gate is known by its name, because its
    place differs between families.
    """
    parent = next((m for m in block.modules() if any(child is down for child in m.children())), None)
    inner = {n: m for n, m in (parent.named_children() if parent is not None else ()) if _is_plain(m) and m is not down}
    gate: Any = next((m for n, m in inner.items() if "gate" in n or n == "w1"), None)
    up: Any = next((m for m in inner.values() if m is not gate), None)
    if gate is None or up is None or len(inner) != 2 or not _is_plain(down) or gate.weight.shape != up.weight.shape:
        return None
    seen: dict[str, Any] = {}
    norms = [m for m in block.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 1]
    handles = [gate.register_forward_pre_hook(lambda _, args: seen.update(read=args[0]))]
    outputs: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles += [m.register_forward_hook(lambda m, args, out: outputs.append((m, args[0], out))) for m in norms]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    before = next((step for step in outputs if step[2] is seen.get("read")), None)
    if before is None:
        return None
    try:
        kind, gain_D, _, _ = norm_of(*before)
    except AdiError:
        return None
    matrices = {"gate_FD": gate.weight, "up_FD": up.weight, "down_DF": down.weight}
    plain = {name: weight.detach().float().cpu() for name, weight in matrices.items()}
    return {"gain_D": gain_D.cpu(), **plain} if kind == "rms" else None


def _is_plain(module: nn.Module) -> bool:
    """A linear map whose matrix is here as numbers, neither offloaded nor packed."""
    weight = module.weight if isinstance(module, nn.Linear) else None
    return weight is not None and not weight.is_meta and weight.is_floating_point() and weight.dim() == 2
