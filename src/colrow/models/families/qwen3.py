"""Qwen3 (Yang et al. 2025): LLaMA with norms of each query and key head."""

from __future__ import annotations

from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    modules=llama.MODULES,
    keys={**llama.KEYS, "qkv_bias": "attention_bias", "output_bias": "attention_bias"},
    fixed={**llama.FIXED, "qk_norm": "each_head"},
    windows="by_layer",
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    gguf=GGUFForm("qwen3", llama.GGUF_MODULES, {**llama.GGUF_FIXED, "qk_norm": "each_head"}),
)
