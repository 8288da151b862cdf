"""StarCoder 2 (Lozhkov et al. 2024): LayerNorms, biases, windows, an MLP without a gate."""

from __future__ import annotations

from colrow.models.families import gpt2, llama
from colrow.models.families.family import Family, GGUFForm

FAMILY = Family(
    name="starcoder2",
    architecture="Starcoder2ForCausalLM",
    modules={
        **llama.MODULES,
        "blocks.{i}.mlp.up": ("model.layers.{i}.mlp.c_fc",),
        "blocks.{i}.mlp.down": ("model.layers.{i}.mlp.c_proj",),
    },
    keys={
        **llama.KEYS,
        "norm_eps": "norm_epsilon",
        "qkv_bias": "use_bias",
        "output_bias": "use_bias",
        "mlp_bias": "use_bias",
        "embedding_dropout": "embedding_dropout",
        "residual_dropout": "residual_dropout",
    },
    fixed={**llama.FIXED, "norm": "layernorm", "gated": False},
    windows="always",
    defaults={
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.018042,
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "tie_word_embeddings": True,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    gguf=GGUFForm(
        "starcoder2",
        {**llama.GGUF_MODULES, "blocks.{i}.mlp.up": ("blk.{i}.ffn_up",)},
        {**llama.GGUF_FIXED, **gpt2.FIXED, "activation": "gelu_tanh"},
        windows=False,  # llama.cpp has none
    ),
)
