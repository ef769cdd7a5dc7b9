"""Take a model's own head apart, by watching what runs between its last block and its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adi.errors import ModelError
from adi.model.arrays import normalise
from adi.model.backbone import ReadOut

PROBE_ROWS = 6
Tail = Callable[[Tensor, Callable[[], object]], Tensor]
NO_START = "exit heads cannot start from it (bare exits still work)"


def last_norm(model: Any, logits_of: Tail, stored: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module that is given the mixture of a state's parts that a head reads; ModelError where there is none."""
    tail, _ = _watch(model, logits_of, _probe(stored).to(device, dtype))
    found: nn.Module | None = next((module for module, _, _ in reversed(tail) if _weight_dim(module) < 2), None)
    if found is None:
        raise ModelError(f"the head of {type(model).__name__} has no norm: {NO_START}")
    return found


def _probe(width: int) -> Tensor:
    return torch.randn((PROBE_ROWS, width), generator=torch.Generator().manual_seed(0))


def take_apart(model: Any, logits_of: Tail, width: int, stored: int, device: torch.device) -> ReadOut:
    """The final norm and matrix as plain values, proved on random states; ValueError where they are something else.

    ``logits_of(hidden_TD, begun)`` runs the model's own tail, and calls ``begun`` where it begins. Where states are
    ``stored`` wider than ``width`` it begins with the last norm, which is given a mixture of their parts.
    """
    probe = _probe(stored).to(device, model.dtype)
    tail, logits = _watch(model, logits_of, probe)
    if stored != width:
        begins = max((i for i, step in enumerate(tail) if _weight_dim(step[0]) < 2), default=0)
        tail = tail[begins:]
        probe = tail[0][1].reshape(PROBE_ROWS, -1)
    norms = [step for step in tail if _weight_dim(step[0]) < 2]
    maps = [m for m, _, _ in tail if _weight_dim(m) == 2]
    head = model.get_output_embeddings()
    first = not norms or (len(norms) == 1 and tail[0] is norms[0])
    if not first or len(norms) + len(maps) != len(tail) or maps[-1:] != [head]:
        names = ", ".join(type(m).__name__ for m, _, _ in tail)
        raise ModelError(f"the head of {type(model).__name__} is not a norm and matrices but {names}: {NO_START}")
    if head.weight.is_meta:
        raise ModelError(f"the head of {type(model).__name__} is offloaded: {NO_START}")
    plain_head = ("none", torch.ones(width, device=device), torch.zeros(width, device=device), 0.0)
    kind, gain, shift, eps = norm_of(*norms[0]) if norms else plain_head
    weight = maps[-1].weight.detach().float()
    for inner in reversed(maps[:-1]):
        if getattr(inner, "bias", None) is not None:
            raise ModelError(f"the head of {type(model).__name__} has an inner bias: {NO_START}")
        weight = weight @ inner.weight.detach().float()
    bias = getattr(head, "bias", None)
    bias = bias.detach().float() if bias is not None else None
    plain = torch.nn.functional.linear(normalise(probe.float(), kind, eps) * gain + shift, weight, bias)
    scale = float((plain * logits).sum() / (plain * plain).sum().clamp_min(1e-12))
    return ReadOut(kind, gain, shift, eps, weight, bias, scale)


def _watch(model: Any, logits_of: Tail, probe: Tensor) -> tuple[list[tuple[Any, Tensor, Tensor]], Tensor]:
    """The leaf modules that change their input between the last block and the logits, with what went in and out."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if args and isinstance(out, Tensor) and out is not args[0]:
            seen.append((module, args[0], out))

    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    handles = [leaf.register_forward_hook(note) for leaf in leaves]
    try:
        logits = logits_of(probe, seen.clear)
    finally:
        for handle in handles:
            handle.remove()
    return [step for step in seen if step[1].shape != step[2].shape or not torch.equal(step[1], step[2])], logits


def _weight_dim(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.dim() if isinstance(weight, Tensor) else 0


def norm_of(module: Any, given: Tensor, out: Tensor) -> tuple[str, Tensor, Tensor, float]:
    """Which of the two normalisations this module is, with its gain and shift, judged by what it did to ``given``."""
    width = given.shape[-1]
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    gain = weight.detach().float() if weight is not None else torch.ones(width, device=given.device)
    shift = bias.detach().float() if bias is not None else torch.zeros(width, device=given.device)
    stated = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    tolerance = 1e-4 if out.dtype == torch.float32 else 3e-2
    for eps in [float(stated)] if stated is not None else [1e-5, 1e-6]:
        for kind in ("rms", "layer"):
            for gains in (gain, 1 + gain):  # Gemma keeps its gains as differences from one
                guess = normalise(given.float(), kind, eps) * gains + shift
                if torch.allclose(guess, out.float(), rtol=tolerance, atol=tolerance):
                    return kind, gains, shift, eps
    raise ModelError(f"{type(module).__name__} is neither RMS nor layer normalisation: {NO_START}")
