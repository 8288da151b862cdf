"""GPT-NeoX (Black et al. 2022) and Pythia: parallel residual, partial rotary positions."""

from __future__ import annotations

from colrow.models.families.family import Family
from colrow.models.hf_rope import RopeKeys

_BLOCK = "gpt_neox.layers.{i}"

FAMILY = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    modules={
        "embedding": ("gpt_neox.embed_in",),
        "blocks.{i}.attention_norm": (f"{_BLOCK}.input_layernorm",),
        "blocks.{i}.attention.qkv": (f"{_BLOCK}.attention.query_key_value",),
        "blocks.{i}.attention.output": (f"{_BLOCK}.attention.dense",),
        "blocks.{i}.mlp_norm": (f"{_BLOCK}.post_attention_layernorm",),
        "blocks.{i}.mlp.up": (f"{_BLOCK}.mlp.dense_h_to_4h",),
        "blocks.{i}.mlp.down": (f"{_BLOCK}.mlp.dense_4h_to_h",),
        "norm": ("gpt_neox.final_layer_norm",),
        "head": ("embed_out",),
    },
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ffn_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "norm_eps": "layer_norm_eps",
        "activation": "hidden_act",
        "parallel_residual": "use_parallel_residual",
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
        "tie_embeddings": "tie_word_embeddings",
        "attention_dropout": "attention_dropout",
        "residual_dropout": "hidden_dropout",
        "embedding_dropout": "hidden_dropout",
        "initializer_range": "initializer_range",
    },
    fixed={"norm": "layernorm", "gated": False, "mlp_bias": True, "position": "rope"},
    rope=RopeKeys(theta="rotary_emb_base", share="rotary_pct", partial=True),
    defaults={
        "attention_bias": True,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
    fused="interleaved",
    habits={
        "activation": "gelu",
        "parallel_residual": True,
        "qkv_bias": True,
        "output_bias": True,
        "rotary_share": 0.25,
    },
)
