"""GPT-2 (Radford et al. 2019) and GPT-3, which has its form."""

from __future__ import annotations

from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm

FIXED: dict[str, object] = {
    "norm": "layernorm",
    "gated": False,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
}
_BLOCK = "transformer.h.{i}"

FAMILY = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    modules={
        "embedding": ("transformer.wte",),
        "positions": ("transformer.wpe",),
        "blocks.{i}.attention_norm": (f"{_BLOCK}.ln_1",),
        "blocks.{i}.attention.qkv": (f"{_BLOCK}.attn.c_attn",),
        "blocks.{i}.attention.output": (f"{_BLOCK}.attn.c_proj",),
        "blocks.{i}.mlp_norm": (f"{_BLOCK}.ln_2",),
        "blocks.{i}.mlp.up": (f"{_BLOCK}.mlp.c_fc",),
        "blocks.{i}.mlp.down": (f"{_BLOCK}.mlp.c_proj",),
        "norm": ("transformer.ln_f",),
        "head": ("lm_head",),
    },
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "ffn_size": "n_inner",
        "max_positions": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "activation": "activation_function",
        "tie_embeddings": "tie_word_embeddings",
        "embedding_dropout": "embd_pdrop",
        "attention_dropout": "attn_pdrop",
        "residual_dropout": "resid_pdrop",
        "initializer_range": "initializer_range",
    },
    aliases={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    fixed={**FIXED, "position": "learned", "scaled_residual_init": True},
    defaults={"tie_word_embeddings": True, "n_positions": 1024},
    transposed="blocks",
    refused={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    gguf=GGUFForm(
        "gpt2",
        {
            **llama.GGUF_MODULES,
            "blocks.{i}.attention.qkv": ("blk.{i}.attn_qkv",),
            "blocks.{i}.mlp.up": ("blk.{i}.ffn_up",),
        },
        {
            **FIXED,
            "position": "learned",
            "activation": "gelu_tanh",
            "scaled_residual_init": True,
        },
    ),
    habits={"activation": "gelu_tanh", "dropout": 0.1, "tie_embeddings": True},
)
