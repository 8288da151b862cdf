"""Qwen2 and Qwen2.5 (Yang et al. 2024): LLaMA with biases of Q, K and V."""

from __future__ import annotations

from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    modules=llama.MODULES,
    keys=llama.KEYS,
    fixed={**llama.FIXED, "qkv_bias": True},
    windows="by_layer",
    defaults={"num_key_value_heads": 32},
    gguf=GGUFForm("qwen2", llama.GGUF_MODULES, {**llama.GGUF_FIXED, "qkv_bias": True}),
)
