"""Gemma 3's language models (Gemma team 2025): Gemma 2 without soft caps, with norms of heads.

Layers with a window have rotary positions of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from colrow.files import shown
from colrow.layers.options import RopeConfig
from colrow.models.config_limits import SIZES, check_whole
from colrow.models.families import gemma2, llama
from colrow.models.families.family import GGUFForm, GGUFNumber
from colrow.models.families.gemma2 import FULL, SLIDING
from colrow.models.hf_rope import RopeKeys, rope_config, spelled_rope

_THETA = {FULL: 1e6, SLIDING: 1e4}
_FORM: dict[str, object] = {"qk_norm": "each_head"}


@dataclass(frozen=True)
class Gemma3(gemma2.Gemma):
    """Gemma 3, with what it says in tables of its own."""

    pattern: int = 6
    special: int = 62  # layers of the 27B model

    def read_pattern(self, values: Mapping[str, Any]) -> int:
        """As older configurations say it."""
        pattern = values.get("sliding_window_pattern", self.pattern)
        check_whole("sliding_window_pattern", pattern, 1, SIZES["num_layers"])
        return int(pattern)

    def read_ropes(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Two kinds of rotary positions."""
        ropes = {kind: self._rope(kind, fields, values) for kind in (FULL, SLIDING)}
        _set_ropes(fields, ropes[FULL], ropes[SLIDING])

    def _rope(self, kind: str, fields: Mapping[str, Any], values: Mapping[str, Any]) -> RopeConfig:
        """Of the layers of one kind: from a table for each, or from keys beside each other.

        A scaling beside the tables is of the layers that see all keys, as in transformers.
        """
        tables, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
        if not isinstance(tables, Mapping) or (tables and not {FULL, SLIDING} & tables.keys()):
            raise ValueError(
                f"rope_parameters={shown(tables)}: a gemma3_text configuration has a table for "
                f"{FULL} and one for {SLIDING} there"
            )
        table = tables.get(kind) or {}
        if not isinstance(table, Mapping) or not isinstance(scaling, Mapping):
            raise ValueError(f"rope_parameters of {kind}={shown(table)}: must be a table")
        beside = values.get("rope_theta" if kind == FULL else "rope_local_base_freq")
        given = {"rope_theta": beside or _THETA[kind], **table}
        if kind == FULL:
            given |= scaling
        given.pop("truncate", None)  # which transformers looks for beside the two tables
        trained = {"max_position_embeddings": values.get("max_position_embeddings")}
        table = {**trained, "rope_parameters": given}
        return rope_config(table, fields["head_dim"], self.rope, self.name)

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """As transformers writes it today."""
        super().spell(values, fields)
        local = fields["window_rope"] or fields["rope"]
        values["rope_parameters"] = {
            FULL: spelled_rope(fields["rope"], fields["head_dim"]),
            SLIDING: spelled_rope(local, fields["head_dim"]),
        }

    def complete_gguf(
        self, fields: dict[str, Any], number: GGUFNumber, names: Collection[str]
    ) -> None:
        """And the rotary positions of layers with a window."""
        super().complete_gguf(fields, number, names)
        local = RopeConfig(number("rope.freq_base_swa", _THETA[SLIDING]), fields["head_dim"])
        _set_ropes(fields, fields["rope"], local)


def _set_ropes(fields: dict[str, Any], everywhere: RopeConfig, local: RopeConfig) -> None:
    """Of a model whose layers all have a window, only the second counts."""
    windows = fields["windows"]
    if all(windows):
        everywhere = local
    elif not any(windows):
        local = everywhere
    fields["rope"] = everywhere
    fields["window_rope"] = None if local == everywhere else local


FAMILY = Gemma3(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    modules=gemma2.MODULES,
    keys=gemma2.KEYS,
    fixed={**llama.FIXED, **gemma2.FORM, **_FORM},
    windows="own",
    rope=RopeKeys(partial=False),
    defaults=gemma2.DEFAULTS,
    reads=frozenset({"query_pre_attn_scalar"}),
    gguf=GGUFForm(
        "gemma3",
        gemma2.GGUF_MODULES,
        {**gemma2.GGUF_FIXED, **_FORM},
        reads=frozenset({"attention.sliding_window_pattern", "rope.freq_base_swa"}),
        centred_norms=True,
    ),
)
