"""GLM-4 of 2024 (GLM team): LLaMA with interleaved rotary pairs in half of each head."""

from __future__ import annotations

from colrow.models.families import llama
from colrow.models.families.family import Family
from colrow.models.hf_rope import RopeKeys

MODULES = {**llama.MODULES, "blocks.{i}.mlp.up": ("model.layers.{i}.mlp.gate_up_proj",)}
KEYS = {**llama.KEYS, "qkv_bias": "attention_bias"}
ROPE = RopeKeys(partial=True, interleaved=True)
DEFAULTS: dict[str, object] = {
    "attention_bias": True,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-7,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}

FAMILY = Family(
    name="glm",
    architecture="GlmForCausalLM",
    modules=MODULES,
    keys=KEYS,
    fixed=llama.FIXED,
    rope=ROPE,
    defaults=DEFAULTS,
)
