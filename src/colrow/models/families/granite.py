"""Granite 3 (IBM 2024): LLaMA whose embedding, residuals, scores and logits are scaled."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm, GGUFNumber


@dataclass(frozen=True)
class Granite(Family):
    """Granite, which divides its logits."""

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """By a number above 0."""
        super().complete(fields, values)
        fields["logit_scale"] = _inverse("logits_scaling", values.get("logits_scaling"))

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """The number that logits are divided by."""
        super().spell(values, fields)
        exact = 1 / fields["logit_scale"]
        short = round(exact, 9)
        values["logits_scaling"] = short if short and 1 / short == fields["logit_scale"] else exact

    def complete_gguf(
        self, fields: dict[str, Any], number: GGUFNumber, names: Collection[str]
    ) -> None:
        """The scales, of which 0 means none."""
        if not number("rope.scaling.finetuned", True):
            raise ValueError(
                "granite.rope.scaling.finetuned=False means no rotary positions, which is not "
                "supported"
            )
        fields["logit_scale"] = _inverse("granite.logit_scale", number("logit_scale", None))
        fields["attention_scale"] = number("attention.scale", 0) or None
        fields["residual_scale"] = number("residual_scale", 0) or 1.0
        fields["embedding_scale"] = number("embedding_scale", 0) or 1.0


def _inverse(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{name}={value!r}: must be a number above 0")
    return 1 / value


FAMILY = Granite(
    name="granite",
    architecture="GraniteForCausalLM",
    modules=llama.MODULES,
    keys={
        **llama.KEYS,
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "attention_scale": "attention_multiplier",
    },
    fixed=llama.FIXED,
    defaults={
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    reads=frozenset({"logits_scaling"}),
    gguf=GGUFForm(
        "granite",
        llama.GGUF_MODULES,
        llama.GGUF_FIXED,
        reads=frozenset(
            {
                "attention.scale",
                "embedding_scale",
                "logit_scale",
                "residual_scale",
                "rope.scaling.finetuned",
            }
        ),
        windows=False,
        optional_biases={
            "qkv_bias": "blk.0.attn_q.bias",
            "output_bias": "blk.0.attn_output.bias",
            "mlp_bias": "blk.0.ffn_gate.bias",
        },
        paired_heads=True,
    ),
)
