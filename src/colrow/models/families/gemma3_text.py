"""Gemma 3's language models (Gemma team 2025): norms around the layers, windows by layer.

Layers with a window have rotary positions of their own, the embedding is scaled, and norms are
stored as what is added to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from colrow.files import shown
from colrow.layers.options import RopeConfig
from colrow.models.config_limits import SIZES, check_number, check_whole
from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm
from colrow.models.hf_rope import RopeKeys, rope_config, spelled_rope

_PATTERN = 6  # every so many layers one sees all keys
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_THETA = {_GLOBAL: 1e6, _LOCAL: 1e4}
_FORM: dict[str, object] = {
    "norms": "around",
    "norm_centred": True,
    "norm_wide": True,
    "qk_norm": "each_head",
}
_GGUF_PLACES = {
    "blocks.{i}.attention_post_norm": ("blk.{i}.post_attention_norm",),
    "blocks.{i}.mlp_post_norm": ("blk.{i}.post_ffw_norm",),
}
_LARGEST = 62  # layers of the 27B model, whose scale alone llama.cpp computes in another way


@dataclass(frozen=True)
class Gemma3(Family):
    """Gemma 3, with what it says in tables of its own."""

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Windows by pattern, two kinds of rotary positions, the scales."""
        layers, window = fields["num_layers"], values.get("sliding_window")
        pattern = values.get("sliding_window_pattern", _PATTERN)
        check_whole("sliding_window_pattern", pattern, 1, SIZES["num_layers"])
        kinds = values.get("layer_types") or _kinds(layers, pattern)
        if window is None and _LOCAL in kinds:
            raise ValueError(
                "gemma3_text with sliding_window=null has layers of sliding_attention and no "
                "window for them: set it, or name full_attention alone in layer_types"
            )
        fields["windows"] = tuple(window if kind == _LOCAL else None for kind in kinds)
        ropes = {kind: self._rope(kind, fields, values) for kind in (_GLOBAL, _LOCAL)}
        _set_ropes(fields, ropes[_GLOBAL], ropes[_LOCAL])
        scalar = values.get("query_pre_attn_scalar", 256)
        check_number("query_pre_attn_scalar", scalar)
        if not scalar:
            raise ValueError("query_pre_attn_scalar=0: must be above 0")
        fields["attention_scale"] = scalar**-0.5
        fields["embedding_scale"] = math.sqrt(fields["hidden_size"])

    def _rope(self, kind: str, fields: Mapping[str, Any], values: Mapping[str, Any]) -> RopeConfig:
        """Of the layers of one kind: from a table for each, or from keys beside each other.

        A scaling beside the tables is of the layers that see all keys, as in transformers.
        """
        tables, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
        if not isinstance(tables, Mapping) or (tables and not {_GLOBAL, _LOCAL} & tables.keys()):
            raise ValueError(
                f"rope_parameters={shown(tables)}: a gemma3_text configuration has a table for "
                f"{_GLOBAL} and one for {_LOCAL} there"
            )
        table = tables.get(kind) or {}
        if not isinstance(table, Mapping) or not isinstance(scaling, Mapping):
            raise ValueError(f"rope_parameters of {kind}={shown(table)}: must be a table")
        beside = values.get("rope_theta" if kind == _GLOBAL else "rope_local_base_freq")
        given = {"rope_theta": beside or _THETA[kind], **table}
        if kind == _GLOBAL:
            given |= scaling
        return rope_config({"rope_parameters": given}, fields["head_dim"], self.rope, self.name)

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """As transformers writes it today."""
        windows = fields["windows"] or (None,) * fields["num_layers"]
        values["layer_types"] = [_LOCAL if window else _GLOBAL for window in windows]
        local = fields["window_rope"] or fields["rope"]
        values["rope_parameters"] = {
            _GLOBAL: spelled_rope(fields["rope"], fields["head_dim"]),
            _LOCAL: spelled_rope(local, fields["head_dim"]),
        }
        scalar = fields["attention_scale"] ** -2
        values["query_pre_attn_scalar"] = round(scalar) if _near(scalar) else scalar

    def complete_gguf(
        self, fields: dict[str, Any], number: Callable[[str, float | None], float]
    ) -> None:
        """What llama.cpp's graph of this architecture has without a key."""
        window = next((each for each in fields["windows"] if each), None)
        pattern = number("attention.sliding_window_pattern", _PATTERN)
        if isinstance(pattern, bool) or pattern < 1 or pattern != int(pattern):
            raise ValueError(
                f"gemma3.attention.sliding_window_pattern={pattern!r}: "
                "a whole number from 1 is read"
            )
        kinds = _kinds(fields["num_layers"], int(pattern))
        fields["windows"] = tuple(window if kind == _LOCAL else None for kind in kinds)
        local = RopeConfig(number("rope.freq_base_swa", _THETA[_LOCAL]), fields["head_dim"])
        _set_ropes(fields, fields["rope"], local)
        size = fields["head_dim"]
        if fields["num_layers"] == _LARGEST:
            size = fields["hidden_size"] // fields["num_heads"]
        fields["attention_scale"] = size**-0.5
        fields["embedding_scale"] = math.sqrt(fields["hidden_size"])


def _kinds(layers: int, pattern: int) -> list[str]:
    return [_GLOBAL if (layer + 1) % pattern == 0 else _LOCAL for layer in range(layers)]


def _set_ropes(fields: dict[str, Any], everywhere: RopeConfig, local: RopeConfig) -> None:
    """Of a model whose layers all have a window, only the second counts."""
    windows = fields["windows"]
    if all(windows):
        everywhere = local
    elif not any(windows):
        local = everywhere
    fields["rope"] = everywhere
    fields["window_rope"] = None if local == everywhere else local


def _near(scalar: float) -> bool:
    return math.isclose(scalar, round(scalar), rel_tol=1e-12)


FAMILY = Gemma3(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    modules={
        **llama.MODULES,
        "blocks.{i}.attention_post_norm": ("model.layers.{i}.post_attention_layernorm",),
        "blocks.{i}.mlp_norm": ("model.layers.{i}.pre_feedforward_layernorm",),
        "blocks.{i}.mlp_post_norm": ("model.layers.{i}.post_feedforward_layernorm",),
    },
    keys={
        **llama.KEYS,
        "activation": "hidden_activation",
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
    },
    fixed={**llama.FIXED, **_FORM},
    windows="own",
    rope=RopeKeys(partial=False),
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "sliding_window": 4096,
    },
    reads=frozenset({"query_pre_attn_scalar"}),
    gguf=GGUFForm(
        "gemma3",
        {**llama.GGUF_MODULES, **_GGUF_PLACES},
        {**llama.GGUF_FIXED, **_FORM, "activation": "gelu_tanh"},
        reads=frozenset({"attention.sliding_window_pattern", "rope.freq_base_swa"}),
        centred_norms=True,
    ),
)
