"""Command R7B and Command A (Cohere 2024): Cohere with windows in three of four layers.

The others see all keys and have no rotary positions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from colrow.models.config_limits import SIZES, check_whole
from colrow.models.families import cohere, llama
from colrow.models.families.family import Family, GGUFForm, GGUFNumber
from colrow.models.hf_rope import RopeKeys

_PATTERN = 4


@dataclass(frozen=True)
class Cohere2(Family):
    """Cohere 2, whose layers with a window are those that rotate."""

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Windows by layer."""
        super().complete(fields, values)
        pattern, window = (
            values.get("sliding_window_pattern", _PATTERN),
            values.get("sliding_window"),
        )
        check_whole("sliding_window_pattern", pattern, 1, SIZES["num_layers"])
        kinds = _kinds(fields, int(pattern))
        if "layer_types" in values:
            kinds = [kind == "sliding_attention" for kind in values["layer_types"]]
        if window is None and any(kinds):
            raise ValueError(
                "cohere2 with sliding_window=null has layers of sliding_attention and no window "
                "for them: set it, or name full_attention alone in layer_types"
            )
        _set_windows(fields, window, kinds)

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """As transformers writes it today."""
        super().spell(values, fields)
        windows = fields["windows"] or (None,) * fields["num_layers"]
        values["layer_types"] = [
            "sliding_attention" if window else "full_attention" for window in windows
        ]

    def complete_gguf(
        self, fields: dict[str, Any], number: GGUFNumber, names: Collection[str]
    ) -> None:
        """The scale, and windows by pattern."""
        fields["logit_scale"] = number("logit_scale", None) or 1.0
        pattern = number("attention.sliding_window_pattern", _PATTERN)
        check_whole("cohere2.attention.sliding_window_pattern", pattern, 1, SIZES["num_layers"])
        window = int(number("attention.sliding_window", None))
        _set_windows(fields, window, _kinds(fields, int(pattern)))


def _kinds(fields: Mapping[str, Any], pattern: int) -> list[bool]:
    """Whether a layer has a window."""
    return [(layer + 1) % pattern != 0 for layer in range(fields["num_layers"])]


def _set_windows(fields: dict[str, Any], window: int | None, kinds: list[bool]) -> None:
    fields["windows"] = tuple(window if kind else None for kind in kinds)
    fields["rope_layers"] = tuple(kinds)


FAMILY = Cohere2(
    name="cohere2",
    architecture="Cohere2ForCausalLM",
    modules=llama.MODULES,
    keys=cohere.KEYS,
    fixed={**llama.FIXED, **cohere.FORM},
    windows="own",
    rope=RopeKeys(interleaved=True),
    defaults={**cohere.DEFAULTS, "sliding_window": 4096},
    gguf=GGUFForm(
        "cohere2",
        llama.GGUF_MODULES,
        {**llama.GGUF_FIXED, **cohere.FORM},
        reads=frozenset({"attention.sliding_window_pattern", "logit_scale"}),
    ),
)
