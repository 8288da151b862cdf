"""Reads a Hugging Face ``config.json`` into our configuration. Plain Python, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from colrow.files import check_inside, read_json, shown
from colrow.layers.options import Activation
from colrow.models.config import ModelConfig
from colrow.models.config_limits import check_hf_values
from colrow.models.families import family_named
from colrow.models.families.family import Family
from colrow.models.hf_rope import windows

ACTIVATION_NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# What transformers assumes for keys that a configuration leaves out.
_DEFAULTS: dict[str, object] = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "layer_norm_eps": 1e-5,
    "rms_norm_eps": 1e-6,
}
# Keys of other architectures that change numbers but no tensor's shape, so that weights would load
# and answer wrongly, to the value that changes nothing; null never does.
_FOREIGN_KEYS: dict[str, object] = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_chunk_size": None,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "dual_chunk_attention_config": None,
    "embedding_multiplier": 1,
    "final_logit_softcapping": None,
    "is_causal": True,
    "logit_scale": 1,
    "logits_scaling": 1,
    "no_rope_layers": None,
    "normalize_embedding": False,
    "parallel_attn": False,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1,
    "rope_interleaved": False,
    "scale_depth": None,
    "scale_emb": 1,
    "scale_embedding": False,
    "use_alibi": False,
    "use_bidirectional_attention": False,
    "use_logn_attn": False,
    "use_parallel_residual": False,
    "use_mrope": False,
}


def config_from_file(path: str | Path) -> ModelConfig:
    """Reads a Hugging Face ``config.json``, or the one inside a directory.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is not such a file, or asks for something unsupported.
    """
    file, values = read_config(path)
    try:
        return config_from_hf(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_config(path: str | Path) -> tuple[Path, dict[str, object]]:
    """The ``config.json`` that is meant, or the one inside a directory, and its contents.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is not a table in JSON, or a link that leaves the directory.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        if path.is_dir():
            check_inside(file, path)
        content = read_json(file)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no config.json at {path}, which a Hugging Face model has"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a model configuration: it should be a table")
    return file, content


def config_from_hf(values: Mapping[str, object]) -> ModelConfig:
    """Our configuration from the contents of a Hugging Face ``config.json``.

    Raises:
        ValueError: unknown architecture, missing key, or an option that the decoder lacks.
    """
    if not isinstance(name := values.get("model_type"), str):
        raise ValueError(f"the configuration has model_type={shown(name)}, not a name")
    family = family_named(name)
    values = {**family.defaults, **_renamed(values, family)}
    values = {**_DEFAULTS, **{key: value for key, value in values.items() if value is not None}}
    check_hf_values(values, family.keys)
    if (stored := values.get("quantization_config")) is not None and not (
        isinstance(stored, Mapping) and stored.get("quant_method") in family.quantised
    ):
        quantised = shown(stored)
        raise ValueError(
            f"this {family.name} checkpoint is quantised ({quantised}), which "
            "the decoder cannot read: use the original checkpoint or a GGUF file"
        )
    read = {*family.keys.values(), *family.reads}
    for key, supported in {**_FOREIGN_KEYS, **family.refused}.items():
        if key not in read and values.get(key, supported) != supported:
            raise ValueError(
                f"{family.name} with {key}={shown(values[key])} is not supported: it changes the "
                "numbers in a way that this decoder does not know"
            )
    fields: dict[str, Any] = dict(family.fixed)
    for name, key in family.keys.items():
        if key in values:
            fields[name] = values[key]
    hidden = _required(fields, "hidden_size", family)
    heads = _required(fields, "num_heads", family)
    if "head_dim" not in fields and hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_heads={heads}")
    fields.setdefault("num_kv_heads", heads)
    fields.setdefault("head_dim", hidden // heads)
    if "intermediate_size" not in family.keys.values():
        fields.setdefault("ffn_size", 4 * hidden)
    fields["activation"] = _activation(str(fields.get("activation", "silu")), family)
    layers = _required(fields, "num_layers", family)
    fields["windows"] = windows(values, layers, family.windows, family.name)
    fields["bos_token_id"] = values.get("bos_token_id")
    padding = values.get("pad_token_id")
    if isinstance(padding, int) and padding < 0:  # counted from the end, as nn.Embedding does
        padding += _required(fields, "vocab_size", family)
    fields["pad_token_id"] = padding
    eos = values.get("eos_token_id")
    fields["eos_token_ids"] = (
        tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else ()
    )
    for name in ("vocab_size", "num_layers", "ffn_size", "max_positions"):
        _required(fields, name, family)
    family.complete(fields, values)
    return family.compose(fields)


def _renamed(values: Mapping[str, object], family: Family) -> dict[str, object]:
    """The configuration with one spelling for each key."""
    renamed = {key: value for key, value in values.items() if key not in family.aliases}
    for alias, key in family.aliases.items():
        value = values.get(alias)
        if value is None:
            continue
        if renamed.get(key) is None:
            renamed[key] = value
        elif renamed[key] != value:
            raise ValueError(
                f"{alias}={value!r} and {key}={renamed[key]!r} mean the same in {family.name} and "
                "should be equal"
            )
    return renamed


def _required(fields: Mapping[str, object], name: str, family: Family) -> int:
    value = fields.get(name)
    if not isinstance(value, int):
        key = family.keys.get(name, name)
        raise ValueError(f"the {family.name} configuration has no integer {key!r}")
    return value


def _activation(name: str, family: Family) -> Activation:
    if name == "gelu_bloom":
        return "gelu_bloom"
    if name not in ACTIVATION_NAMES:
        known = ", ".join(sorted(ACTIVATION_NAMES))
        raise ValueError(f"{family.name} with activation {name!r}: the decoder knows {known}")
    return ACTIVATION_NAMES[name]
