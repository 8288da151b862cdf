"""SmolLM3 (Hugging Face 2025): LLaMA with every fourth layer without rotary positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from colrow.files import shown
from colrow.models.config_limits import SIZES, check_whole
from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm, GGUFNumber
from colrow.models.hf_rope import RopeKeys

_INTERVAL = 4
_BIASES = {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias"}


@dataclass(frozen=True)
class SmolLM3(Family):
    """SmolLM3, which lists the layers that rotate."""

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """The layers that rotate, and windows in those that do not, where there are any."""
        super().complete(fields, values)
        layers, listed = fields["num_layers"], values.get("no_rope_layers")
        if listed is None:
            interval = values.get("no_rope_layer_interval", _INTERVAL)
            check_whole("no_rope_layer_interval", interval, 1, SIZES["num_layers"])
            listed = _turns(layers, int(interval))
        if not isinstance(listed, list) or not all(turns in (0, 1) for turns in listed):
            raise ValueError(f"no_rope_layers={shown(listed)}: must be a list of 0 and 1")
        if len(listed) < layers:
            raise ValueError(f"no_rope_layers names {len(listed)} layers, and there are {layers}")
        turns = fields["rope_layers"] = tuple(map(bool, listed[:layers]))
        window = values.get("sliding_window") if values.get("use_sliding_window") else None
        kinds = values.get("layer_types")
        seen = [kind == "sliding_attention" for kind in kinds] if kinds else [not t for t in turns]
        if window is not None:
            fields["windows"] = tuple(window if each else None for each in seen)
        elif kinds and any(seen):
            raise ValueError(
                "layer_types asks for sliding_attention, and this smollm3 configuration has no "
                "window for it: set sliding_window and use_sliding_window, or leave layer_types out"
            )

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """Layer by layer."""
        super().spell(values, fields)
        layers, windows = fields["num_layers"], fields["windows"]
        turns = fields["rope_layers"] or (fields["rope"] is not None,) * layers
        values["no_rope_layers"] = [int(each) for each in turns]
        values["use_sliding_window"] = bool(windows)
        values["layer_types"] = [
            "sliding_attention" if window else "full_attention"
            for window in windows or (None,) * layers
        ]

    def complete_gguf(
        self, fields: dict[str, Any], number: GGUFNumber, names: Collection[str]
    ) -> None:
        """As in llama.cpp's graph, every fourth layer."""
        fields["rope_layers"] = tuple(map(bool, _turns(fields["num_layers"], _INTERVAL)))


def _turns(layers: int, interval: int) -> list[int]:
    return [int((layer + 1) % interval != 0) for layer in range(layers)]


FAMILY = SmolLM3(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    modules=llama.MODULES,
    keys={**llama.KEYS, **_BIASES},
    fixed=llama.FIXED,
    windows="own",
    rope=RopeKeys(usual_theta=2000000.0),
    defaults={
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "pad_token_id": 128004,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    reads=frozenset({"no_rope_layers"}),
    gguf=GGUFForm(
        "smollm3",
        llama.GGUF_MODULES,
        llama.GGUF_FIXED,
        windows=False,
        optional_biases={
            "qkv_bias": "blk.0.attn_q.bias",
            "output_bias": "blk.0.attn_output.bias",
            "mlp_bias": "blk.0.ffn_gate.bias",
        },
        paired_heads=True,
    ),
)
