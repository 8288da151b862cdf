"""BLOOM (BigScience 2022): ALiBi, a norm behind the embedding."""

from __future__ import annotations

from colrow.models.families import gpt2
from colrow.models.families.family import Family

_BLOCK = "transformer.h.{i}"

FAMILY = Family(
    name="bloom",
    architecture="BloomForCausalLM",
    modules={
        "embedding": ("transformer.word_embeddings",),
        "embedding_norm": ("transformer.word_embeddings_layernorm",),
        "blocks.{i}.attention_norm": (f"{_BLOCK}.input_layernorm",),
        "blocks.{i}.attention.qkv": (f"{_BLOCK}.self_attention.query_key_value",),
        "blocks.{i}.attention.output": (f"{_BLOCK}.self_attention.dense",),
        "blocks.{i}.mlp_norm": (f"{_BLOCK}.post_attention_layernorm",),
        "blocks.{i}.mlp.up": (f"{_BLOCK}.mlp.dense_h_to_4h",),
        "blocks.{i}.mlp.down": (f"{_BLOCK}.mlp.dense_4h_to_h",),
        "norm": ("transformer.ln_f",),
        "head": ("lm_head",),
    },
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "attention_dropout": "attention_dropout",
        "residual_dropout": "hidden_dropout",
        "initializer_range": "initializer_range",
    },
    aliases={
        "n_embed": "hidden_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
    fixed={
        **gpt2.FIXED,
        "position": "alibi",
        "activation": "gelu_bloom",
        "embedding_norm": True,
        "max_positions": 2048,
    },
    defaults={"tie_word_embeddings": True},
    fused="interleaved",
    refused={"apply_residual_connection_post_layernorm": False},
    habits={"tie_embeddings": True},
)
