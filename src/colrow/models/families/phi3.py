"""Phi-3 (Abdin et al. 2024): LLaMA with Q, K and V in one matrix, and gate and up in another."""

from __future__ import annotations

from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm
from colrow.models.hf_rope import RopeKeys

FAMILY = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    modules={
        **llama.MODULES,
        "blocks.{i}.attention.qkv": (f"{llama.ATTENTION}.qkv_proj",),
        "blocks.{i}.mlp.up": ("model.layers.{i}.mlp.gate_up_proj",),
    },
    keys={**llama.KEYS, "residual_dropout": "resid_pdrop"},
    fixed=llama.FIXED,
    windows="always",
    rope=RopeKeys(partial=True),
    defaults={"resid_pdrop": 0.0, "rms_norm_eps": 1e-5},
    gguf=GGUFForm(
        "phi3",
        {
            **llama.GGUF_MODULES,
            "blocks.{i}.attention.qkv": ("blk.{i}.attn_qkv",),
            "blocks.{i}.mlp.up": ("blk.{i}.ffn_up",),
        },
        llama.GGUF_FIXED,
    ),
)
