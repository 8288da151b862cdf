"""Phi-3 and Phi-4 (Abdin et al. 2024): LLaMA with Q, K and V in one matrix, gate and up in another.

Models for long texts have LongRoPE's factors, and Phi-4-mini rotates a part of each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm
from colrow.models.hf_rope import RopeKeys

_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Phi3(Family):
    """Phi-3, whose original positions stand beside the table of rotary positions."""

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """There as well."""
        super().spell(values, fields)
        if _ORIGINAL in values["rope_parameters"]:
            values[_ORIGINAL] = values["rope_parameters"][_ORIGINAL]


FAMILY = Phi3(
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
    rope=RopeKeys(
        partial=True,
        kinds={
            "default": "default",
            "longrope": "longrope",
            "su": "longrope",
            "yarn": "longrope",
        },
    ),
    defaults={"resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "pad_token_id": 32000, _ORIGINAL: 4096},
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
