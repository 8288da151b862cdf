"""Models of Hugging Face configurations, as the planner sees them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from colrow.files import shown
from colrow.models.config_limits import SIZES, check_whole
from colrow.planner.catalog import shape_of_sizes
from colrow.planner.model import ModelShape

# Architectures put together from keys, with the family whose biases and norms they have.
_COMPOSED = {"kimi_k2": "llama", "glm4_moe": "qwen2"}


def model_from_config_json(path: str | Path) -> ModelShape:
    """The model of a Hugging Face ``config.json``, or of a directory that contains one.

    Raises:
        ValueError: when the file is missing or not such a configuration, or the architecture is
            not supported.
    """
    from colrow.models.hf_config import read_config

    try:
        file, mapping = read_config(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: No such file, or a directory without config.json") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    name = file.parent.name if file.name == "config.json" else file.stem
    try:
        return model_from_mapping(mapping, name=name or "model")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def model_from_mapping(mapping: Mapping[str, object], *, name: str) -> ModelShape:
    """The model of a Hugging Face configuration's keys.

    Raises:
        ValueError: for an architecture that is not known, or keys that are missing.
    """
    from colrow.models.hf_config import config_from_hf

    family = str(mapping.get("model_type"))
    if family in _COMPOSED:
        return _composed(mapping, name, family)
    return ModelShape(name, config_from_hf(dict(mapping)), source="config.json")


def _composed(mapping: Mapping[str, object], name: str, family: str) -> ModelShape:
    """Latent attention, shared experts, first layers without experts, as the keys say."""

    def count(*keys: str) -> int:
        return _count(mapping, family, *keys)

    def optional(key: str) -> int:
        return count(key) if mapping.get(key) is not None else 0

    latent: tuple[int, ...] = ()
    if "kv_lora_rank" in mapping:
        per_head = tuple(
            count(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        latent = (optional("q_lora_rank"), count("kv_lora_rank"), *per_head)
    width = count("moe_intermediate_size", "intermediate_size")
    frequency = mapping.get("moe_layer_freq", 1)
    if frequency != 1:
        raise ValueError(
            f"{name}: moe_layer_freq={frequency!r}: experts in every layer are counted"
        )
    heads = count("num_attention_heads")
    return shape_of_sizes(
        name,
        _COMPOSED[family],
        hidden=count("hidden_size"),
        layers=count("num_hidden_layers"),
        heads=heads,
        kv_heads=heads if latent else count("num_key_value_heads"),
        head_dim=sum(latent[2:4]) if latent else count("head_dim"),
        ffn=width,
        vocab=count("vocab_size"),
        positions=count("max_position_embeddings"),
        tied=bool(mapping.get("tie_word_embeddings", False)),
        experts=count("n_routed_experts", "num_local_experts", "num_experts"),
        active_experts=count("num_experts_per_tok"),
        source="config.json",
        shared_ffn=optional("n_shared_experts") * width,
        dense_layers=optional("first_k_dense_replace"),
        dense_ffn=count("intermediate_size"),
        latent=latent,
    )


def _count(mapping: Mapping[str, object], family: str, *keys: str) -> int:
    """The whole number under the first of these keys that is there."""
    for key in keys:
        value = mapping.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            check_whole(
                key, value, 1, SIZES["max_positions" if "position" in key else "vocab_size"]
            )
            return value
        if value is not None:
            raise ValueError(
                f"{key}={shown(value)}: a {family} configuration has a whole number there"
            )
    raise ValueError(f"a {family} configuration needs {' or '.join(keys)}")
