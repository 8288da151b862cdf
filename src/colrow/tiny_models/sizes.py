"""Sizes of the tiny models: by the name of a configuration's field, and where a type needs others.

The sizes are awkward on purpose: nothing divides by 2 and 3 at once that need not. Heads come as 5
without grouping and as 6 over 2 or 3 KV heads with it, so that both a KV head that two ranks share
and a rank with more KV heads than its neighbour occur.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 97
HEAD_DIM = 8
UNGROUPED_HEADS = 5
GROUPED_HEADS = 6

# Width of the residual stream, one entry for each name that configurations give it.
HIDDEN = ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "dim")
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_blocks",
    "depth",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "conf_num_hidden_layers",
)
HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "attention_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
    "num_encoder_attention_heads",
    "num_decoder_attention_heads",
    "swa_num_attention_heads",
    "conf_num_attention_heads",
)
KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "kv_n_heads",
    "swa_num_key_value_heads",
    "num_global_key_value_heads",
)

# Probabilities: what is compared must not be random.
DROPOUT = (
    "dropout",
    "pdrop",
    "dropout_prob",
    "layerdrop",
    "drop_rate",
    "dropout_rate",
    "jitter_noise",
)

# Experts are chosen by groups of them: no more groups than this, and of those no more than that.
GROUPS = {"n_group": 2, "num_expert_group": 2, "topk_group": 1, "o_groups": 2}

# What is divided over the ranks besides heads; even sizes round these up to a multiple of 6.
WIDTHS: dict[str, int] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "audio_vocab_size": VOCABULARY,
    "intermediate_size": 37,
    "ffn_dim": 37,
    "dim_ff": 37,
    "dff": 37,
    "d_ff": 37,
    "d_inner": 37,
    "n_inner": 37,
    "mlp_dim": 37,
    "ffn_hidden_size": 37,
    "decoder_ffn_dim": 37,
    "encoder_ffn_dim": 37,
    "dense_intermediate_size": 37,
    "intermediate_size_mlp": 37,
    "feed_forward_size": 37,
    "shared_intermediate_size": 21,
    "shared_expert_intermediate_size": 21,
    "shared_experts_intermediate_size": 21,
    "moe_shared_expert_intermediate_size": 21,
    "moe_intermediate_size": 13,
    "expert_ffn_hidden_size": 13,
}
EVEN_MULTIPLE = 6
EVEN_HEADS = 6

# Everything else with one value whatever the model.
FIELDS: dict[str, Any] = {
    "type_vocab_size": 2,
    # Positions
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "model_max_length": 64,
    "context_length": 64,
    "max_target_positions": 64,
    "max_source_positions": 24,
    "original_max_position_embeddings": 32,
    "sliding_window": 5,
    "sliding_window_size": 5,
    "attention_window_size": 5,
    "attention_chunk_size": 6,
    "local_attention": 6,
    "window_size": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "position_bias_num_buckets": 8,
    "position_bias_max_distance": 16,
    "num_buckets": 8,
    "relative_max_distance": 16,
    # Experts
    "num_experts": 6,
    "n_routed_experts": 6,
    "num_local_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # Attention
    "head_dim": HEAD_DIM,
    "attention_head_dim": HEAD_DIM,
    "attention_head_size": HEAD_DIM,
    "swa_head_dim": HEAD_DIM,
    "global_head_dim": HEAD_DIM,
    "dim_head": HEAD_DIM,
    "d_head": HEAD_DIM,
    "d_kv": HEAD_DIM,
    "kv_channels": HEAD_DIM,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 10,
    "v_head_dim": 7,
    "q_lora_rank": 11,
    "kv_lora_rank": 9,
    "o_lora_rank": 9,
    "rotary_dim": 4,
    "query_pre_attn_scalar": HEAD_DIM,
    "index_head_dim": 8,
    "index_n_heads": 3,
    "index_topk": 4,
    # Linear attention and state spaces
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "linear_num_heads": 5,
    "linear_head_dim": 8,
    "state_size": 5,
    "ssm_state_size": 5,
    "mamba_d_state": 5,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    # Embeddings besides the tokens'
    "embedding_size": 20,
    "hidden_size_per_layer_input": 6,
    "laurel_rank": 4,
    # Images and sound
    "image_size": 12,
    "patch_size": 4,
    "num_mel_bins": 8,
}
