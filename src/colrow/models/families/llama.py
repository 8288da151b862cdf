"""LLaMA (Touvron et al. 2023), and the names that many families took over from it."""

from __future__ import annotations

from colrow.models.families.family import Family, GGUFForm

ATTENTION = "model.layers.{i}.self_attn"
MODULES: dict[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens",),
    "blocks.{i}.attention_norm": ("model.layers.{i}.input_layernorm",),
    "blocks.{i}.attention.qkv": (
        f"{ATTENTION}.q_proj",
        f"{ATTENTION}.k_proj",
        f"{ATTENTION}.v_proj",
    ),
    "blocks.{i}.attention.query_norm": (f"{ATTENTION}.q_norm",),
    "blocks.{i}.attention.key_norm": (f"{ATTENTION}.k_norm",),
    "blocks.{i}.attention.output": (f"{ATTENTION}.o_proj",),
    "blocks.{i}.mlp_norm": ("model.layers.{i}.post_attention_layernorm",),
    "blocks.{i}.mlp.up": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    "blocks.{i}.mlp.down": ("model.layers.{i}.mlp.down_proj",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
}
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
    "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range",
}
FIXED: dict[str, object] = {
    "norm": "rmsnorm",
    "gated": True,
    "position": "rope",
    "freeze_padding": True,
}
GGUF_MODULES: dict[str, tuple[str, ...]] = {
    "embedding": ("token_embd",),
    "positions": ("position_embd",),
    "blocks.{i}.attention_norm": ("blk.{i}.attn_norm",),
    "blocks.{i}.attention.qkv": ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v"),
    "blocks.{i}.attention.query_norm": ("blk.{i}.attn_q_norm",),
    "blocks.{i}.attention.key_norm": ("blk.{i}.attn_k_norm",),
    "blocks.{i}.attention.output": ("blk.{i}.attn_output",),
    "blocks.{i}.mlp_norm": ("blk.{i}.ffn_norm",),
    "blocks.{i}.mlp.up": ("blk.{i}.ffn_gate", "blk.{i}.ffn_up"),
    "blocks.{i}.mlp.down": ("blk.{i}.ffn_down",),
    "norm": ("output_norm",),
    "head": ("output",),
}
GGUF_FIXED: dict[str, object] = {"norm": "rmsnorm", "position": "rope", "freeze_padding": True}

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    modules=MODULES,
    keys={
        **KEYS,
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    },
    fixed=FIXED,
    # The converter stores this architecture's Q and K as interleaved rotary pairs. Its files also
    # hold Mistral and SmolLM models.
    gguf=GGUFForm(
        "llama",
        GGUF_MODULES,
        GGUF_FIXED,
        optional_biases={
            "qkv_bias": "blk.0.attn_q.bias",
            "output_bias": "blk.0.attn_output.bias",
            "mlp_bias": "blk.0.ffn_gate.bias",
        },
        paired_heads=True,
    ),
)
