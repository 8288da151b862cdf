"""A Hugging Face ``config.json`` from our configuration: the way back of ``config_from_hf``."""

from __future__ import annotations

from typing import Any

from colrow.models.config import ModelConfig
from colrow.models.families import family_named
from colrow.models.hf_config import ACTIVATION_NAMES, config_from_hf

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "bloom": "BloomForCausalLM",
}


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The contents of a ``config.json`` that means this model.

    Raises:
        ValueError: when reading it would give another configuration.
    """
    family = family_named(config.family)
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family.name]],
        "model_type": family.name,
    }
    names = {ours: theirs for theirs, ours in reversed(ACTIVATION_NAMES.items())}
    for field, key in family.keys.items():
        value = getattr(config, field)
        if field == "activation":
            value = names.get(value, value)
        values[key] = value
    if config.rope is not None:
        rope = config.rope
        parameters: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
        if rope.dims != config.head_dim:
            parameters["partial_rotary_factor"] = rope.dims / config.head_dim
        if rope.scaling != "default":
            parameters["factor"] = rope.factor
        if rope.scaling == "llama3":
            parameters["low_freq_factor"] = rope.low_freq_factor
            parameters["high_freq_factor"] = rope.high_freq_factor
            parameters["original_max_position_embeddings"] = rope.original_max_positions
        values["rope_parameters"] = parameters
    windows = [window for window in config.windows if window is not None]
    if family.windows != "never":
        values["sliding_window"] = windows[0] if windows else None
    if family.windows == "by_layer":
        values["use_sliding_window"] = bool(windows)
    if family.windows == "by_layer" or len(windows) < len(config.windows):
        values["layer_types"] = [
            "sliding_attention" if config.window(layer) else "full_attention"
            for layer in range(config.num_layers)
        ]
    values["bos_token_id"] = config.bos_token_id
    values["pad_token_id"] = config.pad_token_id
    eos = list(config.eos_token_ids)
    values["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
    read = config_from_hf(values)
    if read != config:
        raise ValueError(
            f"this {config.family} model has settings that its Hugging Face configuration cannot "
            f"say: {_difference(read, config)}"
        )
    return values


def _difference(read: ModelConfig, config: ModelConfig) -> str:
    for name, value in vars(config).items():
        if getattr(read, name) != value:
            return f"{name}={value!r}"
    return "unknown"
