"""Models of real shapes with random weights: what size costs, with nothing to download."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from adi.cache import cache_folder, usable_cache, whole_folder
from adi.model.hub import quiet_transformers

LLAMA: dict[str, Any] = {"vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 131072}
SHAPES: dict[str, dict[str, Any]] = {  # as published in the configurations of Llama 3.2
    "llama-0.3b": {**LLAMA, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16},
    "llama-1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "llama-3b": {**LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
SHAPES["llama-long"] = {**SHAPES["llama-0.3b"], "num_hidden_layers": 2}  # for long texts
KV_HEADS = 8
SEED = 0
SPREAD = 0.02  # of the weights: transformers' own choice for a new Llama


def shaped(name: str) -> Path:
    """The folder of such a model in bfloat16, made in the cache on first use. It has no tokenizer, so its rounded weights are
    fitted to no text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = cache_folder() / "shapes" / name
    if folder.is_dir():
        return folder
    config = LlamaConfig(**SHAPES[name], num_key_value_heads=KV_HEADS, bos_token_id=None, eos_token_id=None, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    usable_cache(2 * sum(math.prod(p.shape) for p in model.parameters()))
    folder = cache_folder() / "shapes" / name
    with quiet_transformers(), whole_folder(folder) as fresh:
        torch.manual_seed(SEED)
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=SPREAD)
        model.save_pretrained(fresh)
    return folder
