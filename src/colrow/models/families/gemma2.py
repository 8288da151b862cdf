"""Gemma 2 (Gemma team 2024): soft caps, norms around the layers, windows in every other layer.

The embedding is scaled, and norms are stored as what is added to 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from colrow.models.config_limits import check_number
from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm, GGUFNumber
from colrow.models.hf_rope import RopeKeys

FULL, SLIDING = "full_attention", "sliding_attention"
FORM: dict[str, object] = {"norms": "around", "norm_centred": True, "norm_wide": True}
MODULES = {
    **llama.MODULES,
    "blocks.{i}.attention_post_norm": ("model.layers.{i}.post_attention_layernorm",),
    "blocks.{i}.mlp_norm": ("model.layers.{i}.pre_feedforward_layernorm",),
    "blocks.{i}.mlp_post_norm": ("model.layers.{i}.post_feedforward_layernorm",),
}
KEYS = {
    **llama.KEYS,
    "activation": "hidden_activation",
    "qkv_bias": "attention_bias",
    "output_bias": "attention_bias",
}
DEFAULTS: dict[str, object] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "pad_token_id": 0,
}
GGUF_MODULES = {
    **llama.GGUF_MODULES,
    "blocks.{i}.attention_post_norm": ("blk.{i}.post_attention_norm",),
    "blocks.{i}.mlp_post_norm": ("blk.{i}.post_ffw_norm",),
}
GGUF_FIXED = {**llama.GGUF_FIXED, **FORM, "activation": "gelu_tanh"}


@dataclass(frozen=True)
class Gemma(Family):
    """What Gemma 2 and Gemma 3 share.

    Attributes:
        pattern: every so many layers one sees all keys, the others a window.
        special: a number of layers for which llama.cpp computes the scale of attention scores in
            another way, since its files do not say it.
    """

    pattern: int = 2
    special: int = 46

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Windows by layer, the scales, rotary positions."""
        kinds, window = values.get("layer_types"), values.get("sliding_window")
        if kinds is None:
            kinds = self.kinds(fields["num_layers"], self.read_pattern(values))
        if window is None and SLIDING in kinds:
            raise ValueError(
                f"{self.name} with sliding_window=null has layers of sliding_attention and no "
                "window for them: set it, or name full_attention alone in layer_types"
            )
        fields["windows"] = tuple(window if kind == SLIDING else None for kind in kinds)
        scalar = values.get("query_pre_attn_scalar", 256)
        check_number("query_pre_attn_scalar", scalar)
        if not scalar:
            raise ValueError("query_pre_attn_scalar=0: must be above 0")
        fields["attention_scale"] = scalar**-0.5
        fields["embedding_scale"] = math.sqrt(fields["hidden_size"])
        self.read_ropes(fields, values)

    def read_pattern(self, values: Mapping[str, Any]) -> int:
        """Every so many layers one sees all keys."""
        return self.pattern

    def read_ropes(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Rotary positions, of layers of both kinds."""
        super().complete(fields, values)

    @staticmethod
    def kinds(layers: int, pattern: int) -> list[str]:
        """What each layer sees."""
        return [FULL if (layer + 1) % pattern == 0 else SLIDING for layer in range(layers)]

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """As transformers writes it today."""
        super().spell(values, fields)
        windows = fields["windows"] or (None,) * fields["num_layers"]
        values["layer_types"] = [SLIDING if window else FULL for window in windows]
        scalar = fields["attention_scale"] ** -2
        near = math.isclose(scalar, round(scalar), rel_tol=1e-12)
        values["query_pre_attn_scalar"] = round(scalar) if near else scalar

    def complete_gguf(
        self, fields: dict[str, Any], number: GGUFNumber, names: Collection[str]
    ) -> None:
        """What llama.cpp's graph of this architecture has without a key."""
        key = "attention.sliding_window_pattern"
        pattern = number(key, self.pattern)
        if isinstance(pattern, bool) or pattern < 1 or pattern != int(pattern):
            name = "" if self.gguf is None else f"{self.gguf.architecture}."
            raise ValueError(f"{name}{key}={pattern!r}: a whole number from 1 is read")
        window = next((each for each in fields["windows"] if each), None)
        kinds = self.kinds(fields["num_layers"], int(pattern))
        fields["windows"] = tuple(window if kind == SLIDING else None for kind in kinds)
        size = fields["head_dim"]
        if fields["num_layers"] == self.special:
            size = fields["hidden_size"] // fields["num_heads"]
        fields["attention_scale"] = size**-0.5
        fields["embedding_scale"] = math.sqrt(fields["hidden_size"])


@dataclass(frozen=True)
class Gemma2(Gemma):
    """Gemma 2."""

    def complete_gguf(
        self, fields: dict[str, Any], number: GGUFNumber, names: Collection[str]
    ) -> None:
        """And the soft caps and the window, which llama.cpp has for files without them."""
        window = int(number("attention.sliding_window", 4096))
        fields["windows"] = (window,) * fields["num_layers"] if window else ()
        super().complete_gguf(fields, number, names)
        fields["attention_softcap"] = number("attn_logit_softcapping", 50.0)
        fields["logit_softcap"] = number("final_logit_softcapping", 30.0)


FAMILY = Gemma2(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    modules=MODULES,
    keys={
        **KEYS,
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    },
    fixed={**llama.FIXED, **FORM},
    windows="own",
    rope=RopeKeys(partial=False),
    defaults={**DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    reads=frozenset({"query_pre_attn_scalar"}),
    gguf=GGUFForm(
        "gemma2",
        GGUF_MODULES,
        GGUF_FIXED,
        reads=frozenset(
            {
                "attention.sliding_window_pattern",
                "attn_logit_softcapping",
                "final_logit_softcapping",
            }
        ),
        centred_norms=True,
    ),
)
