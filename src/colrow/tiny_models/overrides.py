"""What single architectures need besides :mod:`colrow.tiny_models.sizes`, as data.

A value of None leaves the field to the configuration class; ``outer.inner`` is a field of a nested
configuration; a leading "!" marks what already the class's default configuration needs.
"""

from __future__ import annotations

from typing import Any

_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 12, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 53,
        "encoder_config.hidden_size_global": 48,
        "decoder_config.hidden_size_global": 48,
    },
    "codegen": {"n_head": 8, "n_embd": 64},  # its fused QKV comes in 4 parts of whole heads
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "attn_config.clip_qkv": 8.0,
        "ffn_config.hidden_size": 48,
    },
    "deepseek_v2": {
        "kv_lora_rank": 8,  # rotations as complex numbers: even strides
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
    },
    "dots1": {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        # The sliding layers have attention of their own sizes.
        "per_layer_config": {
            2: {
                "num_attention_heads": 6,
                "num_key_value_heads": 6,
                "q_lora_rank": 13,
                "kv_lora_rank": 11,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 4,
                "head_dim": 12,
                "v_head_dim": 9,
            }
        },
        "head_dim": 10,
        "rope_parameters": None,
    },
    "falcon_h1": {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_ssm": 48},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "!text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "granitemoehybrid": {
        "mamba_n_heads": 12,
        "mamba_d_head": 8,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 3},
    "mamba2": {"num_heads": 10, "head_dim": 8, "n_groups": 2},
    "mimo_v2_flash": {
        "v_head_dim": 6,
        "num_key_value_heads": 3,  # and twice as many in its sliding layers
        "rope_parameters": {
            "full_attention": _ROPE | {"partial_rotary_factor": 0.5},
            "sliding_attention": _ROPE | {"partial_rotary_factor": 0.5},
        },
    },
    "minimax": {"block_size": 4},
    "ministral": {"head_dim": 8},
    "moshi": {"ffn_dim": 38, "depth_decoder_config.ffn_dim": 38},
    "nemotron": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_size": 48,
    },
    "nemotron_h": {"mamba_num_heads": 12, "mamba_head_dim": 8, "n_groups": 3},
    "qwen4_exp_text": {
        "indexer_n_heads": 3,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 53,
        "split_ngram_parts": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 48},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 11,
        "lsh_attn_chunk_length": 11,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 12,
        "pronunciation_vocab_size": 23,
        "shape_embed_dim": 10,
        "shape_vocab_size": 29,
    },
    "t5": {"decoder_start_token_id": 0},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 96,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}
