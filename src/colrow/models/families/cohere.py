"""Command R and Aya (Cohere 2024): parallel blocks with one norm, a scale of the logits.

Norms are LayerNorms without bias, rotary pairs are interleaved, and Command R+ has norms of queries
and keys with a weight for each head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm, GGUFNumber
from colrow.models.hf_rope import RopeKeys

FORM: dict[str, object] = {
    "norm": "layernorm",
    "norm_bias": False,
    "parallel_residual": True,
    "one_norm": True,
}
KEYS = {
    **llama.KEYS,
    "norm_eps": "layer_norm_eps",
    "qkv_bias": "attention_bias",
    "output_bias": "attention_bias",
    "logit_scale": "logit_scale",
}
DEFAULTS: dict[str, object] = {
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Cohere(Family):
    """Cohere, with norms of queries and keys where a switch says so."""

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """The switch."""
        super().complete(fields, values)
        fields["qk_norm"] = "by_head" if values.get("use_qk_norm") else "none"

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """The switch."""
        super().spell(values, fields)
        values["use_qk_norm"] = fields["qk_norm"] == "by_head"

    def complete_gguf(
        self, fields: dict[str, Any], number: GGUFNumber, names: Collection[str]
    ) -> None:
        """The scale, and norms of heads where there are any."""
        fields["logit_scale"] = number("logit_scale", None) or 1.0
        fields["qk_norm"] = "by_head" if "blk.0.attn_q_norm.weight" in names else "none"


FAMILY = Cohere(
    name="cohere",
    architecture="CohereForCausalLM",
    modules=llama.MODULES,
    keys=KEYS,
    fixed={**llama.FIXED, **FORM},
    rope=RopeKeys(usual_theta=500000.0, interleaved=True),
    defaults=DEFAULTS,
    reads=frozenset({"use_qk_norm"}),
    gguf=GGUFForm(
        "command-r",
        llama.GGUF_MODULES,
        {**llama.GGUF_FIXED, **FORM},
        reads=frozenset({"logit_scale"}),
        windows=False,
        optional_biases={
            "qkv_bias": "blk.0.attn_q.bias",
            "output_bias": "blk.0.attn_output.bias",
        },
    ),
)
