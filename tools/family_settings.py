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
    1: """n_group topk_group first_k_dense_replace num_shared_experts n_shared_experts mamba_dt_rank moe_num_shared_experts
        num_nextn_predict_layers""",
    0: "pad_token_id",
    VOCABULARY: """vocab_size vocab_size_per_layer_input padded_vocab_size max_position_embeddings
        n_positions max_seq_len max_target_positions n_ctx""",
}
OFTEN_NONE = ("head_dim", "pad_token_id", "num_key_value_heads")
TINY = {name: value for value, names in _SAME.items() for name in names.split()}

KINDS = {  # beside transformers' causal language models: readers of images, asked with text, and a form of rotary angles
    "glm5_next": "Glm5NextForConditionalGeneration",
    "kimi_k25": "Kimi_K25ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "mistral4": "Mistral4ForCausalLM",
    "mistral_large4": "MistralLarge4ForConditionalGeneration",
    "nemotron_h_omni": "NemotronH_Omni_Reasoning_V3",
    "phi3, long rope": "Phi3ForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
NAMES = {  # of models as people know them, and what their ``config.json`` calls them
    "Apertus": ["apertus"],
    "BitNet b1.58": ["bitnet"],
    "Command A, Command R7B": ["cohere2"],
    "DeepSeek V3.2": ["deepseek_v32"],
    "DeepSeek V4": ["deepseek_v4"],
    "ERNIE 4.5": ["ernie4_5", "ernie4_5_moe"],
    "Falcon-H1": ["falcon_h1"],
    "Gemma 3n": ["gemma3n_text"],
    "Gemma 4 E2B, E4B": ["gemma4_text"],
    "GLM-4-0414": ["glm4"],
    "GLM-5": ["glm_moe_dsa", "glm5_next"],
    "gpt-oss": ["gpt_oss"],
    "Granite 4 H": ["granitemoehybrid"],
    "Helium": ["helium"],
    "HRM-Text": ["hrm_text"],
    "Inkling": ["inkling_text", "inkling2_text"],
    "Kimi K2.5": ["kimi_k25"],
    "Kimi-Linear": ["kimi_linear"],
    "LFM2": ["lfm2", "lfm2_moe"],
    "Ling 2.5, Ring 2.5": ["bailing_hybrid"],
    "MiniMax M2, M3": ["minimax_m2", "minimax_m3_vl_text"],
    "Ministral 3, Mistral Small 4, Large 4": ["mistral3", "mistral4", "mistral_large4"],
    "MPT": ["mpt"],
    "nanochat": ["nanochat"],
    "Nemotron-H, Nemotron 3 Nano": ["nemotron_h", "nemotron_h_omni"],
    "Olmo Hybrid": ["olmo_hybrid"],
    "Phi-3-128k, Phi-3.5, Phi-4-mini": ["phi3, long rope"],
    "Qwen3-Next": ["qwen3_next"],
    "Qwen3-VL": ["qwen3_vl", "qwen3_vl_moe"],
    "Qwen3.5, Qwen3.6": ["qwen3_5_text", "qwen3_5_moe_text"],
    "Qwen3.8 Flash Next": ["qwen4_exp_text"],
    "Whisper's decoder": ["whisper"],
}
_HEADS = {"num_key_value_heads": 4}
_WINDOWS = ["sliding_attention", "full_attention"] * 3
_THETA = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")}
_SHARED = {"num_kv_shared_layers": 2, "layer_types": _WINDOWS}
_INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash"), _HEADS),
    **dict.fromkeys(("minicpm3", "youtu"), _HEADS),
    **{name: {**_HEADS, "index_topk": 512} for name in ("axk2", "deepseek_v32", "glm_moe_dsa")},
    **dict.fromkeys(("inkling_text", "inkling2_text"), _INKLING),
    "bailing_hybrid": {**_HEADS, "num_expert_group": 1, "linear_head_dim": 8, "layer_group_size": 3},
    "bamba": {"attn_layer_indices": [2, 5], "mamba_chunk_size": 4},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"layer_types": _WINDOWS, "rope_parameters": _THETA},
    "cpmant": {"dim_head": 8, "dim_ff": 64, "num_hidden_layers": LAYERS},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_HEADS, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        **_HEADS,
        "index_topk": 512,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "head_dim": 16,
        "layer_types": ["indexed_attention", "sliding_attention"] * 3,
    },
    "falcon_h1": {"mamba_chunk_size": 4},
    "gemma3n_text": {
        **_SHARED,
        "intermediate_size": 64,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gemma4_text": {**_SHARED, "num_global_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 8, "num_heads": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2, "mamba_chunk_size": 4},
    **{name: {"text_config": _HEADS} for name in ("kimi_k25", "mistral_large4")},
    "glm5_next": {"text_config": {**_HEADS, "qk_rope_head_dim": 0, "index_topk": 512}},
    "mistral4": {
        **_HEADS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
        | {"original_max_position_embeddings": 8},
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "lfm2": {"full_attn_idxs": [2, 5]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "chunk_size": 4},
    "moshi": {"sliding_window": 128},  # past its window ``generate`` differs from the model's own forward
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "full_attention"],
        "mamba_head_dim": 16,
        "chunk_size": 4,
    },
    "qwen4_exp_text": {
        "pad_token_id": 0,
        "eos_token_id": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"] * 2,
    },
    "phi3, long rope": {  # crossed within the text
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 24}
        | {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
        "original_max_position_embeddings": 24,
    },
    "reformer": {"is_decoder": True},
    "roc_bert": {
        "pronunciation_vocab_size": 16,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
        "is_decoder": True,
    },
    "xlm": {"emb_dim": 32, "causal": True, "is_encoder": False},
    "xlstm": {"num_heads": 4, "num_blocks": LAYERS, "chunk_size": 8, "head_dim": ...},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba2": {
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "chunk_size": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_query_groups": 4,
        "num_key_value_heads": 4,
    },
    "zamba": {"attn_layer_period": 3, "attn_layer_offset": 2, "n_mamba_heads": 2, "attention_hidden_size": 64}
    | {"attention_head_dim": 16, "num_key_value_heads": 4, "mamba_dt_rank": 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 3},
}


def configuration(family: str, model: Any = None) -> Any:
    """The family's configuration with all sizes tiny; its text part where ``model``, the class, takes no other."""
    kind = t.CONFIG_MAPPING[family.partition(",")[0]]
    config = tiny_of(kind, SETTINGS.get(family, {}))
    if family == "dbrx":
        config.attn_config.rope_theta = 10000.0
    wanted = getattr(model, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        text = type(config.get_text_config(decoder=True))
        return tiny_of(text, SETTINGS.get(f"{family}_text", {}))
    return config


def tiny_of(kind: Any, own: dict[str, Any]) -> Any:
    """``kind`` with tiny values in the fields that it has; ``own`` overrides them, and ``...`` in it leaves a field alone."""
    fields, subs = vars(kind()), getattr(kind, "sub_configs", {})
    given: dict[str, Any] = {"is_decoder": True} if fields.get("is_decoder") is False else {}
    for name, value in fields.items():
        if isinstance(value, t.PreTrainedConfig):
            given[name] = tiny_of(type(value), own.get(name, {}))
        elif name in TINY and not isinstance(value, bool) and (value is not None or name in OFTEN_NONE):
            given[name] = TINY[name]
    mapped = getattr(kind, "attribute_map", {})
    for name, value in TINY.items():
        if name in mapped and mapped[name] in given:
            given[mapped[name]] = value
    for name, value in own.items():
        if name not in subs:
            given[name] = value
    return kind(**{name: value for name, value in given.items() if value is not ...})
