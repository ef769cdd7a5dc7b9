"""Checkpoints of Ouro's shape (Zhu et al. 2025; names as in ByteDance/Ouro-1.4B) as a ``LoopedForCausalLM``.

Read are the configuration and the names of the weights; the code that comes with such a checkpoint is not run. A turn is the
whole list of blocks, with a norm before and behind attention and MLP; the final norm stands between turns too. Its gate is
linear: ``x = silu(x) - silu(-x)`` makes two units of a ``HaltingGate`` of it. Its own rule (stop once the chances of having
stopped add up to a share) is another than ``halt_threshold``'s, which asks each turn by itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from safetensors.torch import load_file
from torch import Tensor

from adi.errors import FileError, ModelError
from adi.files import expanded
from adi.schema import Positive, read_json_as

GATE = "model.early_exit_gate."


class _Ouro(Struct):
    """Of its configuration what is read."""

    model_type: str
    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    max_position_embeddings: Positive
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    total_ut_steps: Positive = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_parameters: dict[str, float | str] | None = None
    rope_scaling: dict[str, object] | None = None
    use_sliding_window: bool = False
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False


def read_ouro(kind: Any, folder: str | os.PathLike[str]) -> Any:
    """The ``LoopedForCausalLM`` (``kind``) of a folder with ``config.json`` and safetensors, in float32, in evaluation mode.

    FileError for files that are missing or damaged; ModelError for a form that is none of ours, for weights that are missing,
    of another shape or unknown.
    """
    place = expanded(folder)
    stated = read_json_as(place / "config.json", _Ouro, "configuration")
    model = kind(kind.config_class(**_form(stated, place)))
    given = _weights(place)
    if model.config.tie_word_embeddings:
        given.setdefault("lm_head.weight", given.get("model.embed_tokens.weight", torch.zeros(0)))
    wanted = {_name(name): tensor for name, tensor in model.state_dict().items() if not name.startswith("gate.")}
    width = model.config.hidden_size
    wanted |= {f"{GATE}weight": torch.zeros(1, width), f"{GATE}bias": torch.zeros(1)}
    for what, names in (("lacks", wanted.keys() - given.keys()), ("has no place here for", given.keys() - wanted.keys())):
        if names:
            raise ModelError(f"the checkpoint of Ouro's shape in {place} {what} {len(names)} weights, such as {min(names)}.")
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            shapes = f"{tuple(given[name].shape)}, and its configuration says {tuple(tensor.shape)}"
            raise ModelError(f"the weight {name} in {place} has the shape {shapes}.")
    gate = _gate(given.pop(f"{GATE}weight").float(), given.pop(f"{GATE}bias").float())
    model.load_state_dict({_name(name, back=True): tensor for name, tensor in given.items()} | gate)
    return model.eval()


def _form(stated: _Ouro, place: Path) -> dict[str, Any]:
    """The options of a ``LoopedConfig``."""
    heads = stated.num_attention_heads
    rope = stated.rope_parameters or {}
    plain = {
        "model_type": (stated.model_type, "ouro"),
        "num_key_value_heads": (stated.num_key_value_heads or heads, heads),
        "head_dim": (stated.head_dim or stated.hidden_size // heads, stated.hidden_size // heads),
        "rope_scaling": (stated.rope_scaling, None),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "use_sliding_window": (stated.use_sliding_window, False),
        "hidden_act": (stated.hidden_act, "silu"),
    }
    for field, (is_, must) in plain.items():
        if is_ != must:
            raise ModelError(f"{field} in {place / 'config.json'} is {is_!r}; of Ouro's shape only {must!r} is known.")
    return {
        "vocab_size": stated.vocab_size,
        "hidden_size": stated.hidden_size,
        "intermediate_size": stated.intermediate_size,
        "num_attention_heads": heads,
        "core_layers": stated.num_hidden_layers,
        "turns": stated.total_ut_steps,
        "injection": "none",
        "turn_norm": "final",
        "sandwich_norms": True,
        "rope_theta": float(stated.rope_theta or rope.get("rope_theta", 10000.0)),
        "max_position_embeddings": stated.max_position_embeddings,
        "rms_norm_eps": stated.rms_norm_eps,
        "tie_word_embeddings": stated.tie_word_embeddings,
    }


def _weights(place: Path) -> dict[str, Tensor]:
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise FileError(f"there are no weights (*.safetensors) in {place}.")
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            found |= load_file(path)
        except Exception as error:  # the reader raises a class of its own
            raise FileError(f"the weights in {path} are damaged: {error}.") from None
    return found


def _name(name: str, back: bool = False) -> str:
    """Ouro's name of one of our weights, or ours of its own."""
    ours, its = "model.turn.layers.", "model.layers."
    return name.replace(its, ours) if back else name.replace(ours, its)


def _gate(weight_1D: Tensor, bias_1: Tensor) -> dict[str, Tensor]:
    """A linear gate as the first two units of a ``HaltingGate``."""
    width = weight_1D.shape[1]
    hidden_DD, bias_D, stop_1D = torch.zeros(width, width), torch.zeros(width), torch.zeros(1, width)
    for unit, sign in enumerate((1.0, -1.0)):
        hidden_DD[unit], bias_D[unit], stop_1D[0, unit] = sign * weight_1D[0], sign * bias_1[0], sign
    hidden = {"gate.hidden.weight": hidden_DD, "gate.hidden.bias": bias_D}
    return hidden | {"gate.stop.weight": stop_1D, "gate.stop.bias": torch.zeros(1)}
