"""Reads a Hugging Face ``config.json`` into our configuration. Plain Python, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from colrow.layers.options import Activation, RopeConfig
from colrow.models.config import ModelConfig
from colrow.models.families import Family, family_named

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
    "use_parallel_residual": True,
}
_DEFAULTS_BY_FAMILY: dict[str, dict[str, object]] = {
    "gpt2": {"tie_word_embeddings": True, "n_positions": 1024},
    "bloom": {"tie_word_embeddings": True},
    "gpt_neox": {"attention_bias": True, "hidden_act": "gelu", "rotary_pct": 0.25},
}


def config_from_file(path: str | Path) -> ModelConfig:
    """Reads a Hugging Face ``config.json``, or the one inside a directory.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is not such a file, or asks for something unsupported.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no config.json at {path}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a model configuration")
    return config_from_hf(content)


def config_from_hf(values: Mapping[str, object]) -> ModelConfig:
    """Our configuration from the contents of a Hugging Face ``config.json``.

    Raises:
        ValueError: unknown architecture, missing key, or an option that the decoder lacks.
    """
    family = family_named(str(values.get("model_type")))
    values = _present(values)
    _rename_aliases(values, family)
    values = {**_DEFAULTS, **_DEFAULTS_BY_FAMILY.get(family.name, {}), **values}
    if "quantization_config" in values:
        raise ValueError(
            f"this {family.name} checkpoint is quantised ({values['quantization_config']}), which "
            "the decoder cannot read: use the original checkpoint or a GGUF file"
        )
    for key, supported in family.refused.items():
        if values.get(key, supported) != supported:
            raise ValueError(f"{family.name} with {key}={values[key]!r} is not supported")
    fields: dict[str, object] = dict(family.fixed)
    for name, key in family.keys.items():
        if key in values:
            fields[name] = values[key]
    hidden = _required(fields, "hidden_size", family)
    heads = _required(fields, "num_heads", family)
    if "head_dim" not in fields and hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_heads={heads}")
    fields.setdefault("num_kv_heads", heads)
    fields.setdefault("head_dim", hidden // heads)
    fields.setdefault("ffn_size", 4 * hidden)
    fields["activation"] = _activation(str(fields.get("activation", "silu")), family)
    if fields["position"] == "rope":
        fields["rope"] = _rope(values, int(str(fields["head_dim"])))
    fields["windows"] = _windows(values, _required(fields, "num_layers", family))
    fields["bos_token_id"] = values.get("bos_token_id")
    padding = values.get("pad_token_id")
    if isinstance(padding, int) and padding < 0:  # counted from the end, as nn.Embedding does
        padding += _required(fields, "vocab_size", family)
    fields["pad_token_id"] = padding
    eos = values.get("eos_token_id")
    fields["eos_token_ids"] = (
        tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else ()
    )
    for name in ("vocab_size", "num_layers", "max_positions"):
        _required(fields, name, family)
    return ModelConfig(family=family.name, **fields)  # type: ignore[arg-type]


def _present(values: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in values.items() if value is not None}


def _rename_aliases(values: dict[str, object], family: Family) -> None:
    for alias, key in family.aliases.items():
        if alias not in values:
            continue
        value = values.pop(alias)
        if values.setdefault(key, value) != value:
            raise ValueError(
                f"the {family.name} configuration contradicts itself: {alias}={value!r} and "
                f"{key}={values[key]!r} mean the same"
            )


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


def _rope(values: Mapping[str, object], head_dim: int) -> RopeConfig:
    """Both spellings: ``rope_parameters``, and the older ``rope_theta`` with ``rope_scaling``."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"rope_parameters={given!r} is not a table")
    kind = str(given.get("rope_type") or given.get("type") or "default")
    theta = given.get("rope_theta") or values.get("rope_theta") or values.get("rotary_emb_base")
    share = given.get("partial_rotary_factor") or values.get("partial_rotary_factor")
    share = share or values.get("rotary_pct") or 1.0
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope type {kind!r} is not supported: default, linear and llama3 are")
    scaling = {
        name: given[key]
        for name, key in (
            ("factor", "factor"),
            ("low_freq_factor", "low_freq_factor"),
            ("high_freq_factor", "high_freq_factor"),
            ("original_max_positions", "original_max_position_embeddings"),
        )
        if kind != "default" and key in given
    }
    return RopeConfig(
        theta=float(str(theta or 10000.0)),
        dims=int(head_dim * float(str(share))),
        scaling=kind,  # type: ignore[arg-type]
        **scaling,
    )


def _windows(values: Mapping[str, object], num_layers: int) -> tuple[int | None, ...]:
    """Sliding windows: of all layers (Mistral), or of those that ``layer_types`` names (Qwen)."""
    window = values.get("sliding_window")
    if not isinstance(window, int) or values.get("use_sliding_window") is False:
        return ()
    kinds = values.get("layer_types")
    if isinstance(kinds, list):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = 0
    if values.get("use_sliding_window") is True:  # Qwen: the first layers see everything
        first = int(str(values.get("max_window_layers", 28)))
    return tuple(window if index >= first else None for index in range(num_layers))
