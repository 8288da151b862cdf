"""GLM-4 of 2025 (model_type glm4): GLM with norms around the layers."""

from __future__ import annotations

from colrow.models.families import glm, llama
from colrow.models.families.family import Family, GGUFForm

_FORM: dict[str, object] = {"norms": "around"}

FAMILY = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    modules={
        **glm.MODULES,
        "blocks.{i}.attention_post_norm": ("model.layers.{i}.post_self_attn_layernorm",),
        "blocks.{i}.mlp_post_norm": ("model.layers.{i}.post_mlp_layernorm",),
    },
    keys=glm.KEYS,
    fixed={**llama.FIXED, **_FORM},
    rope=glm.ROPE,
    defaults=glm.DEFAULTS,
    gguf=GGUFForm(
        "glm4",
        {
            **llama.GGUF_MODULES,
            "blocks.{i}.mlp.up": ("blk.{i}.ffn_up",),
            "blocks.{i}.attention_post_norm": ("blk.{i}.post_attention_norm",),
            "blocks.{i}.mlp_post_norm": ("blk.{i}.post_ffw_norm",),
        },
        {**llama.GGUF_FIXED, **_FORM},
        windows=False,
        optional_biases={"qkv_bias": "blk.0.attn_q.bias"},
    ),
)
