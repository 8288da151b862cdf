"""Rotary positions and sliding windows, as a Hugging Face configuration says them. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from colrow.files import shown
from colrow.layers.options import RopeConfig, Scaling

# Field of RopeConfig, key of rope_parameters.
_SCALING_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "short_factors": "short_factor",
    "long_factors": "long_factor",
}
_ORIGINAL = _SCALING_KEYS["original_max_positions"]
_TRAINED = "max_position_embeddings"
# Of each kind the fields of its scaling.
_FIELDS: dict[Scaling, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"),
    "yarn": (
        *("factor", "original_max_positions", "beta_fast", "beta_slow", "truncate"),
        "attention_factor",
    ),
    "longrope": ("original_max_positions", "attention_factor", "short_factors", "long_factors"),
}
_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim"),
    *_SCALING_KEYS.values(),
}


@dataclass(frozen=True)
class RopeKeys:
    """How a family spells rotary positions beside the table of them.

    Attributes:
        theta, share: the keys for the base and for the part of a head that rotates. Where they are
            not the usual ones, transformers looks at no other spelling.
        partial: whether a part of a head may rotate at all.
        usual_theta: the base where none is given.
        interleaved: see :class:`colrow.layers.options.RopeConfig`.
        kinds: what transformers takes a name of a kind for.
    """

    theta: str = "rope_theta"
    share: str = "partial_rotary_factor"
    partial: bool = False
    usual_theta: float = 10000.0
    interleaved: bool = False
    kinds: Mapping[str, Scaling] = field(default_factory=lambda: {kind: kind for kind in _FIELDS})


def rope_config(
    values: Mapping[str, object], head_dim: int, keys: RopeKeys, family: str
) -> RopeConfig:
    """From ``rope_parameters``, or the older ``rope_scaling``, with the keys beside them.

    A key inside the table comes before the one beside it, as in transformers.

    Raises:
        ValueError: a kind or key of rotary positions that the decoder lacks, or two spellings that
            say different things.
    """
    tables: dict[str, Mapping[str, object]] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = values.get(name) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{name}={given!r} is not a table")
        if given:
            tables[name] = given
    found = [_rope(table, values, head_dim, keys, family) for table in tables.values() or [{}]]
    if found[0] != found[-1]:
        raise ValueError(
            f"rope_scaling={tables['rope_scaling']!r} and rope_parameters="
            f"{tables['rope_parameters']!r} mean different rotary positions: leave one out"
        )
    return found[0]


def _rope(
    table: Mapping[str, object],
    values: Mapping[str, object],
    head_dim: int,
    keys: RopeKeys,
    family: str,
) -> RopeConfig:
    given = {key: value for key, value in table.items() if value is not None}
    kind = str(given.get("rope_type") or given.get("type") or "default")
    scaling = keys.kinds.get(kind)
    if scaling is None:
        known = ", ".join(keys.kinds)
        raise ValueError(f"rope type {kind!r} is not supported for {family} models: {known} are")
    if unknown := sorted(given.keys() - _ROPE_KEYS):
        raise ValueError(
            f"rope_parameters has {unknown[0]}={given[unknown[0]]!r}, which is not supported"
        )
    theta = float(str(_beside("rope_theta", keys.theta, given, values, family) or keys.usual_theta))
    share = float(str(_beside("partial_rotary_factor", keys.share, given, values, family) or 1.0))
    if share != 1.0 and not keys.partial:
        raise ValueError(f"{family} with partial_rotary_factor={share} is not supported")
    given[_ORIGINAL] = values.get(_ORIGINAL) or given.get(_ORIGINAL) or values.get(_TRAINED)
    fields: dict[str, Any] = {}
    if scaling == "dynamic":
        fields["original_max_positions"] = values.get(_TRAINED)
    for name in _FIELDS[scaling]:
        value = given.get(_SCALING_KEYS[name])
        if value is None:
            value = _assumed(name, scaling, given, values)
        if value is None:
            raise ValueError(
                f"rope type {kind!r} needs {_SCALING_KEYS[name]}, which rope_parameters lacks"
            )
        if name.endswith("_factors"):
            if not isinstance(value, list):
                raise ValueError(f"rope {_SCALING_KEYS[name]}={shown(value)}: must be a list")
            value = tuple(value)
        fields[name] = value
    return RopeConfig(
        theta=theta,
        dims=int(head_dim * share),
        scaling=scaling,
        interleaved=keys.interleaved,
        **fields,
    )


def _assumed(
    name: str, scaling: Scaling, given: Mapping[str, Any], values: Mapping[str, Any]
) -> object:
    """What transformers takes for a missing setting of a scaling; None where it needs one."""
    trained, original = values.get(_TRAINED), given.get(_ORIGINAL)
    factor = given.get("factor")
    if factor is None and isinstance(trained, int) and isinstance(original, int):
        factor = trained / original
    if name == "factor" and scaling == "yarn":
        return factor
    if name == "attention_factor" and isinstance(factor, int | float):
        if scaling == "yarn":
            scales = given.get("mscale"), given.get("mscale_all_dim")
            both = all(isinstance(scale, int | float) and scale for scale in scales)
            over, under = (float(str(scale)) for scale in scales) if both else (1.0, 0.0)
            return yarn_magnitude(factor, over) / yarn_magnitude(factor, under)
        if factor <= 1:
            return 1.0
        if isinstance(original, int) and original > 1:
            return math.sqrt(1 + math.log(factor) / math.log(original))
    return {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}.get(name)


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies by for positions stretched by a factor (Peng et al. 2023, sec. 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _beside(
    key: str, read: str, table: Mapping[str, object], values: Mapping[str, object], family: str
) -> object:
    """A value of the table of rotary positions, or the one that stands beside the table.

    Raises:
        ValueError: a configuration that says it under another name as well, differently.
    """
    value = table.get(key) or values.get(read)
    if read != key and values.get(key) is not None:
        used = value or 10000.0
        if values[key] != used:
            raise ValueError(
                f"{key}={values[key]!r} contradicts what transformers takes for a {family} "
                f"model, {read}={used!r}: make them equal or leave {key} out"
            )
    return value


def spelled_rope(rope: RopeConfig, head_dim: int) -> dict[str, object]:
    """The table ``rope_parameters`` that means these rotary positions."""
    table: dict[str, object] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.dims != head_dim:
        table["partial_rotary_factor"] = rope.dims / head_dim
    spelled = {_SCALING_KEYS[name]: getattr(rope, name) for name in _FIELDS[rope.scaling]}
    return table | {k: list(v) if isinstance(v, tuple) else v for k, v in spelled.items()}


def windows(
    values: Mapping[str, object], num_layers: int, windowed: str, family: str
) -> tuple[int | None, ...]:
    """Per layer, how far back it sees, as transformers' model of the family reads it.

    Raises:
        ValueError: kinds of layers that the decoder lacks, or windows that the family has none of.
    """
    kinds = values.get("layer_types")
    if isinstance(kinds, list):
        if unknown := {str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"{family} with layer_types {sorted(unknown)} is not supported: "
                "full_attention and sliding_attention are"
            )
        if len(kinds) != num_layers:
            raise ValueError(f"layer_types names {len(kinds)} layers, and there are {num_layers}")
    if windowed == "own":
        return ()
    found = _windows(values, num_layers, windowed, family)
    if isinstance(kinds, list) and "sliding_attention" in kinds and not found:
        raise ValueError(
            f"layer_types asks for sliding_attention, and this {family} configuration has no "
            "sliding_window for it: set it and use_sliding_window, or leave layer_types out"
        )
    return found if any(window is not None for window in found) else ()


def _windows(
    values: Mapping[str, object], num_layers: int, windowed: str, family: str
) -> tuple[int | None, ...]:
    window, used = values.get("sliding_window"), values.get("use_sliding_window")
    if not isinstance(window, int):
        return ()
    if windowed == "never":
        if used is False:
            return ()
        raise ValueError(f"{family} with sliding_window={window} is not supported")
    kinds = values.get("layer_types")
    # With layer_types transformers takes a Mistral for a Ministral, whose layers differ.
    if windowed == "always" or (windowed == "listed" and not isinstance(kinds, list)):
        if isinstance(kinds, list) and set(kinds) != {"sliding_attention"}:
            raise ValueError(
                f"{family} with sliding_window={window} and layer_types that name full_attention "
                "contradict each other, since transformers gives every layer the window: take one "
                "of the two out"
            )
        return (window,) * num_layers
    if windowed == "by_layer" and not used:
        return ()
    if not isinstance(kinds, list):
        first = int(str(values.get("max_window_layers", 28)))
        kinds = ["full_attention"] * first + ["sliding_attention"] * max(0, num_layers - first)
        kinds = kinds[:num_layers]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
