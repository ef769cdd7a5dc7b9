"""Can this decoder be split between blocks? Found out by running it, not by a list of names."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adi.errors import AdiError, ModelError
from adi.model.hf.blocks import find_blocks
from adi.model.hf.layout import state_of

ROUTED = "a router sends only some of them deeper (mixture of recursions), and a block's keys and values must be of all tokens"
CACHES = ("past_key_values", "cache_params")


def refuse(model: Any, reason: str) -> AdiError:
    hooked = [name or "the model" for name, module in model.named_modules() if any(map(_foreign, _hooks(module)))]
    hint = f" (with hooks or a forward of its own on {', '.join(hooked[:3])})" if hooked else ""
    return AdiError(f"{type(model).__name__}{hint} cannot be split between blocks: {reason}.")


def _hooks(module: nn.Module) -> list[Any]:
    own = [] if hasattr(module, "_hf_hook") else [vars(module).get("forward")]  # accelerate's is known to be harmless
    return [hook for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *own) if hook is not None]


def _foreign(hook: Any) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith(("transformers.", "adi."))


def require_evaluation(model: Any) -> None:
    """AdiError for a model in training mode as a whole, or with a part that drops states (an adapter put on later)."""
    dropping = (name for name, module in model.named_modules() if module.training and drops(module))
    if model.training or (name := next(dropping, None)) is not None:
        part = "" if model.training else f" ({name})"
        raise ModelError(f"{type(model).__name__} is in training mode{part}; call model.eval() first.")


def drops(module: nn.Module) -> bool:
    """Whether a module drops states in training mode."""
    rates = {**vars(module), "dropout_p": vars(module).get("p") if "Dropout" in type(module).__name__ else 0}
    return any(isinstance(rate, float) and rate > 0 for name, rate in rates.items() if "drop" in name)


def require_numbers(model: Any, logits_TV: Tensor) -> None:
    """AdiError where the model's own logits hold NaN, naming the weight that does too."""
    if logits_TV.isnan().any():
        weights = (name for name, p in model.named_parameters() if p.is_floating_point() and p.isnan().any())
        name = next(weights, None)
        why = f"its weight {name} holds NaN" if name else f"computed in {model.dtype} its logits are NaN; try another precision"
        raise ModelError(f"{type(model).__name__} gives no numbers: {why}.")


def decoder_of(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The model's decoder and its blocks; ValueError names the architecture and the reason when there is none."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise refuse(model, "it is an encoder-decoder; adi runs decoder-only models")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise refuse(model, "its adapter puts virtual tokens before the text, and adi runs none")
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "decoder_layers", getattr(text, "num_hidden_layers", None))  # Whisper has both
    if layers is None or model.get_output_embeddings() is None:
        raise refuse(model, "it has no num_hidden_layers or no language-model head")
    try:
        decoder = next((m for m in (model.get_decoder(), model.base_model) if memory_name(m)), None)
        if decoder is None:
            raise ModelError(f"its decoder takes no memory of the past ({' or '.join(CACHES)})")
        return decoder, find_blocks(decoder, layers)
    except (AdiError, AttributeError) as error:
        raise refuse(model, str(error)) from None


def memory_name(decoder: nn.Module) -> str | None:
    """What its forward calls the memory of the past."""
    return next((name for name in CACHES if name in inspect.signature(decoder.forward).parameters), None)


def outputs_of(model: Any, chain: Sequence[tuple[int, Any, Any]], blocks: Sequence[nn.Module], ids: Tensor) -> list[int]:
    """How many values each block gives in a tuple (0: the state alone), by what the blocks were given and gave in a pass over
    ``ids``.

    Every block is called once, in order. The states of a stack form one chain: each takes what the block before it gave.
    """
    looped = len(set(map(id, blocks))) < len(blocks)
    if [i for i, _, _ in chain] != list(range(len(blocks))):
        raise refuse(model, "its blocks are not each called once and in order")
    outputs, last = [], None
    for i, given, out in chain:
        state = state_of(out)
        if not isinstance(given, Tensor) or not isinstance(state, Tensor) or given.shape != state.shape:
            raise refuse(model, f"block {i} does not turn one state into another of the same shape")
        if looped and given.shape[:1] == ids.shape[:1] and given.shape[1] < ids.shape[1]:
            raise refuse(model, f"block {i} runs over {given.shape[1]} of {ids.shape[1]} tokens; {ROUTED}")
        if last is not None and not looped and not torch.equal(given, last):
            raise refuse(model, f"something else happens between block {i - 1} and block {i}")
        outputs.append(len(out) if isinstance(out, tuple) else 0)
        last = state
    return outputs


def handed_on(chain: Sequence[tuple[int, Any, Any]], entered: Sequence[tuple[int, Any]]) -> tuple[list[int], bool]:
    """The places, in what blocks give, of outputs beside the state that the next block is called with and that can be stored
    as rows of numbers; and whether there are others, such as indices, whose number depends on the length of the text."""
    found = dict[int, Tensor]()
    for (_, _, out), (_, given) in zip(chain, entered[1:], strict=False):
        leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        others = enumerate(out[1:], 1) if isinstance(out, tuple) else ()
        found |= {place: other for place, other in others if any(other is leaf for leaf in leaves)}
    stored = sorted(place for place, other in found.items() if other.is_floating_point())
    return stored, len(stored) < len(found)
