"""What the numbers of a configuration can be: of the right type, finite, and not enormous.

Checked before anything is computed from them or allocated for them. The limits are far above every
published model, so that planning for models that fit nowhere is not in their way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from colrow.files import shown

SIZES: dict[str, int] = {
    "vocab_size": 1 << 26,
    "hidden_size": 1 << 22,
    "num_layers": 1 << 12,
    "num_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "ffn_size": 1 << 24,
    "max_positions": 1 << 40,
}
"""Field of :func:`colrow.models.compose.decoder` to the largest value."""

_LEARNED_POSITIONS = 1 << 26
_PARAMETERS = 1 << 53
_EXPERTS = 1 << 14
_SHARES = ("embedding_dropout", "attention_dropout", "residual_dropout")
_SWITCHES = (
    "gated",
    "parallel_residual",
    "qkv_bias",
    "output_bias",
    "mlp_bias",
    "norm_centred",
    "norm_wide",
    "norm_bias",
    "one_norm",
    "sinks",
    "embedding_norm",
    "tie_embeddings",
    "scaled_residual_init",
    "freeze_padding",
)
_SCALES = ("attention_scale", "embedding_scale", "residual_scale", "logit_scale")
_CAPS = ("attention_softcap", "logit_softcap")
_TOKENS, _TOKEN = 10_000, 1 << 40
_ABOVE_ZERO = ("rope_theta", "rotary_emb_base", "factor", "low_freq_factor", "high_freq_factor")
_ROPE_TABLES = ("rope_parameters", "rope_scaling")


def check_fields(fields: Mapping[str, object], keys: Mapping[str, str] | None = None) -> None:
    """Makes sure that fields of a decoder have values that a model can have.

    Args:
        fields: all of them, or those that are known so far.
        keys: how the file calls them, for messages.

    Raises:
        ValueError: naming the first that has not.
    """
    keys = keys or {}

    def name(field: str) -> str:
        return keys.get(field, field)

    for field, most in SIZES.items():
        if field in fields:
            check_whole(name(field), fields[field], 1, most)
    for field in ("norm_eps", "initializer_range", *_SHARES):
        if field in fields:
            check_number(name(field), fields[field], 1.0 if field in _SHARES else math.inf)
    for field in _SWITCHES:
        if not isinstance(fields.get(field, False), bool):
            raise ValueError(f"{name(field)}={shown(fields[field])}: must be true or false")
    for field in ("bos_token_id", "pad_token_id"):
        if fields.get(field) is not None:
            check_whole(name(field), fields[field], -_TOKEN, _TOKEN)
    for field in ("experts", "active_experts"):
        if field in fields:
            check_whole(name(field), fields[field], 0, _EXPERTS)
    for field in ("expert_ffn_size", "shared_ffn_size"):
        if fields.get(field) is not None:
            check_whole(name(field), fields[field], 0, SIZES["ffn_size"])
    for field in ("router_balance", "router_z"):
        check_number(field, fields.get(field, 0.0))
    for field in (*_SCALES, *_CAPS):
        if fields.get(field) is not None:
            check_number(name(field), fields[field])
            if field in _CAPS and not fields[field]:
                raise ValueError(f"{name(field)}={shown(fields[field])}: must be above 0")
    for turns in _items(fields.get("rope_layers", ())):
        if not isinstance(turns, bool):
            raise ValueError(f"{name('rope_layers')} has {shown(turns)}: must be true or false")
    _check_list(name("eos_token_ids"), fields.get("eos_token_ids", ()), _TOKENS, -_TOKEN)
    layers = SIZES["num_layers"]
    windows = [each for each in _items(fields.get("windows", ())) if each is not None]
    _check_list("windows", windows, layers, 1)
    positions = fields.get("max_positions")
    if fields.get("position") == "learned" and isinstance(positions, int):
        check_whole(name("max_positions"), positions, 1, _LEARNED_POSITIONS)
    _check_product(fields)


def _check_product(fields: Mapping[str, object]) -> None:
    """Sizes that are possible one by one and not together."""
    sizes = {field: value for field in SIZES if isinstance(value := fields.get(field), int)}
    if len(sizes) < len(SIZES):
        return
    ffn, experts = sizes["ffn_size"], fields.get("experts") or 1
    own = fields.get("expert_ffn_size") or ffn
    if isinstance(experts, int) and isinstance(own, int):
        ffn = max(ffn, experts * own)
    width = sizes["num_heads"] * sizes["head_dim"] + ffn
    count = sizes["hidden_size"] * (sizes["num_layers"] * width + sizes["vocab_size"])
    if count > _PARAMETERS:
        raise ValueError(
            f"the configuration is of a model with more than {count:.0e} parameters "
            f"({', '.join(f'{field}={value}' for field, value in sizes.items())})"
        )


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """Raises ``ValueError`` for what is not a whole number in this range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={shown(value)}: must be a whole number")
    if not least <= value <= most:
        what = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"{name}={shown(value)}: must be {what}")


def check_number(name: str, value: object, most: float = math.inf) -> None:
    """Raises ``ValueError`` for what is not a finite number between 0 and ``most``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={shown(value)}: must be a number")
    if not math.isfinite(value) or not 0 <= value <= most:
        limit = f" and at most {most:g}" if math.isfinite(most) else ""
        raise ValueError(f"{name}={shown(value)}: must be finite, at least 0{limit}")


def _items(value: object) -> list[object]:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def _check_list(name: str, value: object, most: int, least: int) -> None:
    items = _items(value)
    if len(items) > most:
        raise ValueError(f"{name} has {len(items)} items: must be at most {most}")
    for item in items:
        check_whole(name, item, least, _TOKEN)


def check_hf_values(values: Mapping[str, object], keys: Mapping[str, str]) -> None:
    """Makes sure that a ``config.json`` has numbers that a model can have.

    Args:
        values: its contents.
        keys: field of a decoder to the key of the file.

    Raises:
        ValueError: naming the first key that has not.
    """
    fields = {field: values[key] for field, key in keys.items() if values.get(key) is not None}
    check_fields(fields, keys)
    tables = [values, *(values[key] for key in _ROPE_TABLES if values.get(key) is not None)]
    for table in tables:
        if not isinstance(table, Mapping):
            raise ValueError(f"rope_parameters={shown(table)}: must be a table")
        for key in _ABOVE_ZERO:
            if table.get(key) is not None:
                check_number(key, table[key])
                if not table[key]:
                    raise ValueError(f"{key}={shown(table[key])}: must be above 0")
        for key in ("partial_rotary_factor", "rotary_pct"):
            if table.get(key) is not None:
                check_number(key, table[key], 1.0)
                if not table[key]:
                    raise ValueError(f"{key}={shown(table[key])}: must be above 0")
        if table.get("original_max_position_embeddings") is not None:
            key = "original_max_position_embeddings"
            check_whole(key, table[key], 1, SIZES["max_positions"])
    for key in ("sliding_window", "max_window_layers"):
        if values.get(key) is not None:
            check_whole(key, values[key], 0, SIZES["max_positions"])
    kinds = values.get("layer_types")
    if kinds is not None and not (
        isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
    ):
        raise ValueError(f"layer_types={shown(kinds)}: must be a list of names")
    if not isinstance(used := values.get("use_sliding_window"), bool | None):
        raise ValueError(f"use_sliding_window={shown(used)}: must be true or false")


_LAYERS = re.compile(r"layers?$|depth(?!wise)|_blocks$")
_SIZES = re.compile(
    r"heads?$|hidden|dim$|size$|vocab|width|channels|experts?$|embd|inner|ffn|rank$|labels$|^d_|^n_"
)
_NEVER_SWITCHES = re.compile(
    r"^num_\w*(layers|heads|experts)$|^(hidden|vocab|intermediate)_size$|^n_(layer|head|embd)$"
)
_COUNTS = re.compile(r"^num_|^n_|_num_")
_ENDLESS = "time_step_limit"  # of state space models, whose default is infinite
_MOST = 1 << 26


def check_any_config(values: object, key: str = "") -> None:
    """Makes sure that a configuration of any architecture has numbers that a model can have.

    Args:
        values: the contents of a ``config.json``, with those of its parts.

    Raises:
        ValueError: naming the first that is NaN, infinite, or beyond every model.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            check_any_config(value, str(name))
    elif isinstance(values, list):
        for value in values:
            check_any_config(value, key)
    elif isinstance(values, float):
        if not math.isfinite(values) and (key != _ENDLESS or math.isnan(values)):
            raise ValueError(f"{key}={values}: must be finite")
    elif isinstance(values, bool):
        if _NEVER_SWITCHES.search(key):
            raise ValueError(f"{key}={values}: must be a whole number")
    elif isinstance(values, int):
        most = SIZES["num_layers"] if _LAYERS.search(key) else _MOST
        if most < _MOST and not _COUNTS.search(key):
            check_whole(key, values, -most, most)  # one of the layers, also from the last
        elif most < _MOST or _SIZES.search(key):
            check_whole(key, values, -1, most)  # -1 stands for "none" here and there


def number_of_layers(values: object, key: str = "") -> int:
    """The largest number of layers that a configuration, or a part of it, speaks of."""
    if isinstance(values, Mapping):
        return max(
            (number_of_layers(value, str(name)) for name, value in values.items()), default=0
        )
    is_number = isinstance(values, int) and _LAYERS.search(key)
    return int(str(values)) if is_number and not isinstance(values, bool) else 0
