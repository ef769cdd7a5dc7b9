"""Tiny random models of many decoder families.

Weights are drawn wide, so that logits differ clearly from token to token, and narrower in the deep blocks, so that exits
are sometimes right.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as t

VOCABULARY, LAYERS = 128, 6
C: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=VOCABULARY
)
KV = dict(num_key_value_heads=2)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1, mlp_only_layers=[])
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=2, mamba_chunk_size=4)
MLA = dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**C, **KV}),
    "mistral": ("Mistral", {**C, **KV, "sliding_window": 8, "head_dim": 8}),
    "qwen2": ("Qwen2", {**C, **KV}),
    "qwen3": ("Qwen3", {**C, **KV, "head_dim": 8}),
    "qwen3_sliding": (
        "Qwen3",
        {**C, **KV, "head_dim": 8, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ),
    "qwen3_moe": ("Qwen3Moe", {**C, **KV, **EXPERTS, "head_dim": 8}),
    "gemma": ("Gemma", {**C, **KV, "head_dim": 8}),
    "gemma2": ("Gemma2", {**C, **KV, "head_dim": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3", {**C, **KV, "head_dim": 8, "sliding_window": 8}),
    "phi": ("Phi", C),
    "phi3": ("Phi3", {**C, **KV, "pad_token_id": 0}),
    "gpt2": ("GPT2", dict(n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY)),
    "gpt_neox": ("GPTNeoX", C),
    "gptj": ("GPTJ", dict(n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY, rotary_dim=4)),
    "opt": (
        "OPT",
        dict(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            word_embed_proj_dim=16,
        ),
    ),
    "olmo": ("Olmo", {**C, **KV}),
    "olmo2": ("Olmo2", {**C, **KV}),
    "granite": ("Granite", {**C, **KV, "logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "cohere": ("Cohere", {**C, **KV}),
    "stablelm": ("StableLm", {**C, **KV}),
    "smollm3": ("SmolLM3", {**C, **KV, "pad_token_id": 0}),
    "falcon": ("Falcon", dict(hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=VOCABULARY)),
    "bloom": ("Bloom", dict(hidden_size=32, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY)),
    "gpt_oss": (
        "GptOss",
        {**C, **KV, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
    ),
    "mixtral": ("Mixtral", {**C, **KV, "num_local_experts": 2}),
    "exaone4": ("Exaone4", {**C, **KV, "sliding_window": 8}),
    "starcoder2": ("Starcoder2", {**C, **KV}),
    "lfm2": ("Lfm2", {**C, **KV, "full_attn_idxs": [2, 5]}),
    "qwen3_next": ("Qwen3Next", {**C, **KV, **EXPERTS, **LINEAR, "head_dim": 8, "shared_expert_intermediate_size": 16}),
    "falcon_h1": ("FalconH1", {**C, **KV, **MAMBA, "mamba_d_ssm": 64}),
    "mamba2": (
        "Mamba2",
        dict(hidden_size=32, num_hidden_layers=LAYERS, num_heads=4, head_dim=16, state_size=8, n_groups=2, vocab_size=128),
    ),
    "jamba": ("Jamba", {**C, **KV, "mamba_dt_rank": 2, "mamba_d_state": 8, "attn_layer_period": 3, "attn_layer_offset": 1}),
    "deepseek_v32": ("DeepseekV32", {**C, **MLA, "index_topk": 512, "index_n_heads": 2, "index_head_dim": 8}),
    "gemma3n": (
        "Gemma3n",
        {**C, **KV, "head_dim": 8, "sliding_window": 8, "num_kv_shared_layers": 2, "laurel_rank": 8}
        | {"layer_types": ["sliding_attention", "full_attention"] * 3, "activation_sparsity_pattern": [0.0] * LAYERS}
        | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    ),
    "glm": ("Glm", {**C, **KV, "head_dim": 8, "pad_token_id": 0}),
    "nemotron": ("Nemotron", {**C, **KV}),
}

IDS = tuple(torch.randint(3, VOCABULARY - 1, (26,), generator=torch.Generator().manual_seed(5)).tolist())


def own_logits(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]  # type: ignore[no-any-return]


@cache
def tiny(family: str) -> Any:
    """The family's random model in float32, made once; end-of-sequence is switched off, so that texts have full length."""
    kind, settings = FAMILIES[family]
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    config_class = getattr(t, f"{kind}TextConfig" if kind in ("Gemma3", "Gemma3n") else f"{kind}Config")
    torch.manual_seed(0)
    model = getattr(t, f"{kind}{suffix}")(config_class(**settings)).eval().float()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            deep = any(f".{layer}." in name for layer in range(2, LAYERS))
            torch.nn.init.normal_(parameter, std=0.05 if deep else 0.08)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
