"""Mistral (Jiang et al. 2023): LLaMA with sliding windows."""

from __future__ import annotations

from colrow.models.families import llama
from colrow.models.families.family import Family

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    modules=llama.MODULES,
    keys=llama.KEYS,
    fixed=llama.FIXED,
    windows="listed",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)
