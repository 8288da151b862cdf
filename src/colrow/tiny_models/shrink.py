"""Tiny configurations of any architecture, from the fields that its configuration class has."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from colrow.tiny_models import sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tiny_config(
    config_class: type[PreTrainedConfig],
    name: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    even: bool = False,
) -> PreTrainedConfig:
    """A configuration of ``config_class`` in which every size is tiny.

    Args:
        config_class: any of transformers'.
        name: of the architecture; chooses between 2 and 3 KV heads.
        overrides: fields that this type needs otherwise; a field of a nested configuration is
            written ``outer.inner``. A value of None takes the field out of what is set here, so
            that the class's own default or rule holds.
        even: sizes that divide by 2 and by 3, and as many KV heads as query heads.

    Raises:
        ValueError, TypeError: whatever the class says when it refuses the sizes.
    """
    overrides = dict(overrides or {})
    default = config_class(**_needed_for_default(overrides))
    return config_class(**_tiny_fields(default, name, overrides, even))


def _needed_for_default(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides without which even the class's default is refused, marked by a leading "!"."""
    return {key[1:]: value for key, value in overrides.items() if key.startswith("!")}


def _tiny_fields(
    default: PreTrainedConfig, name: str, overrides: Mapping[str, Any], even: bool
) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    values = {key: value for key, value in vars(default).items() if not key.startswith("_")}
    heads = _head_fields(values, name, even)
    widths = {key: _rounded(size, even) for key, size in sizes.WIDTHS.items()}
    known = {**sizes.FIELDS, **widths}
    # A layer for each kind that the default has, at least two.
    kept = _kept_layers(values)
    fields: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, PreTrainedConfig):
            inner = {k.split(".", 1)[1]: v for k, v in overrides.items() if k.startswith(f"{key}.")}
            if type(value).model_type or inner or vars(value):
                fields[key] = type(value)(**_tiny_fields(value, name, inner, even))
        elif key in heads:
            fields[key] = heads[key]
        elif key in sizes.LAYERS and _is_count(value):
            fields[key] = len(kept)
        elif key.endswith(("_token_id", "_token_index")) and value is not None:
            fields[key] = _token_id(key, value)
        elif key in known and (_is_count(value) or key == "n_inner"):
            fields[key] = known[key]
        elif key in sizes.GROUPS and _is_count(value):
            fields[key] = min(value, sizes.GROUPS[key])
        elif key == "rope_parameters" and value:
            fields[key] = _tiny_rope(value)
        elif isinstance(value, float) and key.endswith(sizes.DROPOUT):
            fields[key] = 0.0
        elif _per_layer(value, values):
            tiny = known.get(key)
            fields[key] = [value[i] if tiny is None else tiny for i in kept]
    for key, value in overrides.items():
        if "." in key or key.startswith("!"):
            continue
        if value is None:
            fields.pop(key, None)
        elif even and key in sizes.KV_HEADS:
            fields[key] = sizes.EVEN_HEADS
        else:
            fields[key] = value
    return fields


def _head_fields(values: Mapping[str, Any], name: str, even: bool) -> dict[str, int]:
    """Heads, KV heads and the width of the residual stream, where the type has such fields."""
    latent = "kv_lora_rank" in values  # every head has its own keys, made from a latent
    grouped = not latent and any(_is_count(values.get(key)) for key in sizes.KV_HEADS)
    heads = sizes.GROUPED_HEADS if grouped else sizes.UNGROUPED_HEADS
    if even:
        heads = sizes.EVEN_HEADS
    kv_heads = 2 + zlib.crc32(name.encode()) % 2 if grouped and not even else heads
    chosen = {key: heads for key in sizes.HEADS}
    chosen |= {key: 1 if values.get(key) == 1 else kv_heads for key in sizes.KV_HEADS}
    chosen |= {key: heads * sizes.HEAD_DIM for key in sizes.HIDDEN}
    if latent and values.get("head_dim") == values.get("qk_rope_head_dim"):
        chosen["head_dim"] = sizes.FIELDS["qk_rope_head_dim"]
    return {key: size for key, size in chosen.items() if _is_count(values.get(key))}


def _kept_layers(values: Mapping[str, Any]) -> list[int]:
    lists = [value for value in values.values() if _per_layer(value, values)]
    kinds = list(zip(*[[repr(item) for item in value] for value in lists], strict=True))
    kept: list[int] = []
    for i, kind in enumerate(kinds):
        if kind not in [kinds[k] for k in kept]:
            kept.append(i)
    for i in range(len(kinds)):
        if len(kept) < 2 and i not in kept:
            kept.append(i)
    return sorted(kept) if kept else [0, 1]


def _per_layer(value: object, values: Mapping[str, Any]) -> bool:
    depths = {values.get(key) for key in sizes.LAYERS} - {None}
    return isinstance(value, list | tuple) and len(value) > 1 and len(value) in depths


def _rounded(size: int, even: bool) -> int:
    return -(-size // sizes.EVEN_MULTIPLE) * sizes.EVEN_MULTIPLE if even else size


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _token_id(key: str, value: object) -> object:
    """Special tokens at the ends of the vocabulary, whose middle stays for plain ones."""
    if key in _TOKEN_IDS:
        return _TOKEN_IDS[key]
    last = sizes.VOCABULARY - 1
    fixed = last - zlib.crc32(key.encode()) % 6
    return [fixed] if isinstance(value, Sequence) and not isinstance(value, str) else fixed


def _tiny_rope(value: Mapping[str, Any]) -> dict[str, Any]:
    tiny: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            tiny[key] = _tiny_rope(item)
        elif key == "original_max_position_embeddings":
            tiny[key] = sizes.FIELDS[key]
        elif key == "mrope_section":
            tiny[key] = [2, 1, 1]
        else:
            tiny[key] = item
    return tiny
