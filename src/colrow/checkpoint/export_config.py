"""A Hugging Face ``config.json`` from our configuration: the way back of ``config_from_hf``."""

from __future__ import annotations

from typing import Any

from colrow.models.compose import fields_of
from colrow.models.config import ModelConfig
from colrow.models.families import family_named
from colrow.models.hf_config import ACTIVATION_NAMES, config_from_hf


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The contents of a ``config.json`` that means this model.

    Raises:
        ValueError: when reading it would give another configuration.
    """
    family, fields = family_named(config.family), fields_of(config)
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
    }
    names = {ours: theirs for theirs, ours in reversed(ACTIVATION_NAMES.items())}
    for field, key in family.keys.items():
        value = fields[field]
        values[key] = names.get(value, value) if field == "activation" else value
    windows = [window for window in fields["windows"] if window is not None]
    if family.windows != "never":
        values["sliding_window"] = windows[0] if windows else None
    if family.windows == "by_layer":
        values["use_sliding_window"] = bool(windows)
    if family.windows == "by_layer" or len(windows) < len(fields["windows"]):
        values["layer_types"] = [
            "sliding_attention" if block.attention.window else "full_attention"
            for block in config.blocks
        ]
    values["bos_token_id"] = config.bos_token_id
    values["pad_token_id"] = config.pad_token_id
    eos = list(config.eos_token_ids)
    values["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
    family.spell(values, fields)
    read = config_from_hf(values)
    if read != config:
        raise ValueError(
            f"this {config.family} model has settings that its Hugging Face configuration cannot "
            f"say: {_difference(fields_of(read), fields)}"
        )
    return values


def _difference(read: dict[str, Any], fields: dict[str, Any]) -> str:
    for name, value in fields.items():
        if read[name] != value:
            return f"{name}={value!r}"
    return "unknown"
