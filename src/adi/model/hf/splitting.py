"""Can this decoder be split between blocks? Found out by running it, not by a list of names."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from adi.errors import AdiError
from adi.model.hf.patch import find_blocks

RECURRENT_HINT = "adi needs a decoder whose memory of the past can be cut back (attention, or short convolutions)"


def refuse(model: Any, reason: str) -> AdiError:
    return AdiError(f"{type(model).__name__} cannot be split between blocks: {reason}.")


def decoder_of(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The model's decoder and its blocks; ValueError names the architecture and the reason when there is none."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise refuse(model, "it is an encoder-decoder; adi runs decoder-only models")
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    if layers is None or model.get_output_embeddings() is None:
        raise refuse(model, "it has no num_hidden_layers or no language-model head")
    if getattr(text, "num_kv_shared_layers", 0):
        raise refuse(model, "its deep layers read the KV memory of shallow ones, which may be ahead of them")
    try:
        decoder = model.get_decoder()
        if "past_key_values" not in inspect.signature(decoder.forward).parameters:
            raise AdiError(f"its forward takes no past_key_values; {RECURRENT_HINT}")
        return decoder, find_blocks(decoder, layers)
    except (AdiError, AttributeError) as error:
        raise refuse(model, str(error)) from None


def observe(model: Any, decoder: nn.Module, blocks: list[nn.Module], ids: Tensor) -> list[int]:
    """One pass that watches the blocks; returns how many values each gives beside the state.

    The states must form one chain: every block is called once, in order, and takes what the block before it gave.
    """
    chain: list[tuple[int, Tensor, Any]] = []
    handles = [
        block.register_forward_hook(
            lambda _, args, kwargs, out, i=i: chain.append((i, args[0] if args else kwargs.get("hidden_states"), out)),
            with_kwargs=True,
        )
        for i, block in enumerate(blocks)
    ]
    try:
        decoder(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if [i for i, _, _ in chain] != list(range(len(blocks))):
        raise refuse(model, "its blocks are not each called once and in order")
    extras, last = [], None
    for i, given, out in chain:
        state = out[0] if isinstance(out, tuple) else out
        if not isinstance(given, Tensor) or not isinstance(state, Tensor) or given.shape != state.shape:
            raise refuse(model, f"block {i} does not turn one state into another of the same shape")
        if given.shape[:2] != ids.shape:
            raise refuse(model, f"block {i} gives a state of shape {tuple(state.shape)} for {ids.shape[1]} tokens")
        if last is not None and not torch.equal(given, last):
            raise refuse(model, f"something else happens between block {i - 1} and block {i}")
        extras.append(len(out) - 1 if isinstance(out, tuple) else 0)
        last = state
    return extras
