"""Tiny configurations of any family: known fields get tiny values, and a few families need some of their own."""

from __future__ import annotations

from typing import Any

import transformers as t

VOCABULARY, LAYERS = 128, 6

_SAME: dict[Any, str] = {
    32: "hidden_size d_model n_embd dim embedding_size model_dim decoder_hidden_size word_embed_proj_dim hidden_dim",
    64: """intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim dff ffn_hidden_size d_inner ffn_hidden_dim
        mamba_d_ssm""",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers",
    2: """encoder_layers num_encoder_layers num_key_value_heads num_experts_per_tok n_kv_heads num_key_value_groups moe_topk
        linear_num_key_heads moe_k num_experts_per_token mamba_n_groups n_groups num_ngroups mamba_ngroups""",
    4: """num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_decoder_attention_heads
        num_local_experts num_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_n_heads num_linear_heads
        index_n_heads mamba_num_heads linear_num_heads""",
    8: """head_dim sliding_window qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim qk_rope_head_dim
        mamba_d_state state_size ssm_state_size index_head_dim global_head_dim attention_head_dim attention_window_size
        kv_channels""",
    16: """moe_intermediate_size q_lora_rank kv_lora_rank shared_expert_intermediate_size mamba_d_head mamba_head_dim
        expert_ffn_size o_lora_rank moe_shared_expert_intermediate_size hidden_size_per_layer_input expert_ffn_hidden_size
        shared_intermediate_size shared_experts_intermediate_size""",
    VOCABULARY: "vocab_size vocab_size_per_layer_input padded_vocab_size",
    1: """n_group topk_group first_k_dense_replace num_shared_experts n_shared_experts mamba_dt_rank moe_num_shared_experts
        num_nextn_predict_layers""",
    0: "pad_token_id",
    512: "max_position_embeddings n_positions max_seq_len max_target_positions n_ctx",
}
OFTEN_NONE = ("head_dim", "pad_token_id", "num_key_value_heads")
TINY = {name: value for value, names in _SAME.items() for name in names.split()}

KINDS: dict[str, str] = {}  # classes other than the mapping's
_HEADS = {"num_key_value_heads": 4}
_WINDOWS = ["sliding_attention", "full_attention"] * 3
_THETA = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash"), _HEADS),
    **dict.fromkeys(("minicpm3",), _HEADS),
    **{name: {**_HEADS, "index_topk": 512} for name in ("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa")},
    "bailing_hybrid": {**_HEADS, "num_expert_group": 1, "linear_head_dim": 8, "layer_group_size": 3},
    "bamba": {"attn_layer_indices": [2, 5], "mamba_chunk_size": 4},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"layer_types": _WINDOWS, "rope_parameters": _THETA},
    "cpmant": {"dim_head": 8, "dim_ff": 64, "num_hidden_layers": LAYERS},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_chunk_size": 4},
    "gemma3n_text": {
        "intermediate_size": 64,
        "num_kv_shared_layers": 2,
        "layer_types": _WINDOWS,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "chunk_size": 4},
}


def configuration(family: str) -> Any:
    """The family's configuration with all sizes tiny."""
    kind = t.CONFIG_MAPPING[family]
    return tiny_of(kind, SETTINGS.get(family, {}))


def tiny_of(kind: Any, own: dict[str, Any]) -> Any:
    """``kind`` with tiny values in the fields that it has; ``own`` overrides them, and None in it leaves a field alone."""
    given: dict[str, Any] = {}
    fields = vars(kind())
    subs = getattr(kind, "sub_configs", {})
    for name, value in fields.items():
        if name in subs:
            continue
        if (
            name in TINY
            and name not in own
            and not isinstance(value, bool)
            and (value is not None or name in ("head_dim", "pad_token_id", "num_key_value_heads"))
        ):
            given[name] = TINY[name]
    mapped = getattr(kind, "attribute_map", {})
    for name, value in TINY.items():
        if name in mapped and mapped[name] in given:
            given[mapped[name]] = value
    for name, sub in subs.items():
        if isinstance(sub, type) and hasattr(sub, "model_type") and sub.model_type:
            given[name] = tiny_of(sub, own.get(name, {}))
    given |= {name: value for name, value in own.items() if name not in subs}
    return kind(**{name: value for name, value in given.items() if value is not ...})
