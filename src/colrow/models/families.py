"""One small table per model family: names of its weights, and of the keys of its configuration.

Plain Python, no torch. A new family of the same building blocks is a new table, not new code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from colrow.layers.options import Activation, RopeConfig
from colrow.models.config import ModelConfig

FusedLayout = Literal["separate", "side_by_side", "interleaved"]

ACTIVATION_NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Family:
    """Names of one family.

    Attributes:
        name: as in ``model_type`` of its Hugging Face configuration.
        modules: colrow's module name to the checkpoint's, ``{i}`` being the layer number. Several
            names are fused side by side, in this order.
        qkv_layout: how a single checkpoint matrix holds Q, K and V: one after the other
            ("side_by_side") or head by head ("interleaved"). "separate" when there are three.
        transposed: block matrices are stored ``[in, out]``.
        keys: field of :class:`ModelConfig` to key of the configuration.
        fixed: fields that are the same for every model of the family.
        refused: key to the only value that is supported.
    """

    name: str
    modules: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str]
    fixed: Mapping[str, object]
    qkv_layout: FusedLayout = "separate"
    transposed: bool = False
    refused: Mapping[str, object] = field(default_factory=dict)


_LLAMA_MODULES = {
    "embedding": ("model.embed_tokens",),
    "blocks.{i}.attention_norm": ("model.layers.{i}.input_layernorm",),
    "blocks.{i}.attention.qkv": (
        "model.layers.{i}.self_attn.q_proj",
        "model.layers.{i}.self_attn.k_proj",
        "model.layers.{i}.self_attn.v_proj",
    ),
    "blocks.{i}.attention.query_norm": ("model.layers.{i}.self_attn.q_norm",),
    "blocks.{i}.attention.key_norm": ("model.layers.{i}.self_attn.k_norm",),
    "blocks.{i}.attention.output": ("model.layers.{i}.self_attn.o_proj",),
    "blocks.{i}.mlp_norm": ("model.layers.{i}.post_attention_layernorm",),
    "blocks.{i}.mlp.up": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    "blocks.{i}.mlp.down": ("model.layers.{i}.mlp.down_proj",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
}
_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
    "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range",
}
_LLAMA_FIXED: dict[str, object] = {
    "norm": "rmsnorm",
    "gated": True,
    "position": "rope",
    "freeze_padding": True,
}
_BLOOM_LIKE: dict[str, object] = {
    "norm": "layernorm",
    "gated": False,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            modules=_LLAMA_MODULES,
            keys={**_LLAMA_KEYS, "qkv_bias": "attention_bias", "output_bias": "attention_bias",
                  "mlp_bias": "mlp_bias"},
            fixed=_LLAMA_FIXED,
        ),
        Family(
            name="mistral",
            modules=_LLAMA_MODULES,
            keys=_LLAMA_KEYS,
            fixed=_LLAMA_FIXED,
        ),
        Family(
            name="qwen2",
            modules=_LLAMA_MODULES,
            keys=_LLAMA_KEYS,
            fixed={**_LLAMA_FIXED, "qkv_bias": True},
        ),
        Family(
            name="qwen3",
            modules=_LLAMA_MODULES,
            keys={**_LLAMA_KEYS, "qkv_bias": "attention_bias", "output_bias": "attention_bias"},
            fixed={**_LLAMA_FIXED, "qk_norm": True},
        ),
        Family(
            name="gpt2",
            modules={
                "embedding": ("transformer.wte",),
                "positions": ("transformer.wpe",),
                "blocks.{i}.attention_norm": ("transformer.h.{i}.ln_1",),
                "blocks.{i}.attention.qkv": ("transformer.h.{i}.attn.c_attn",),
                "blocks.{i}.attention.output": ("transformer.h.{i}.attn.c_proj",),
                "blocks.{i}.mlp_norm": ("transformer.h.{i}.ln_2",),
                "blocks.{i}.mlp.up": ("transformer.h.{i}.mlp.c_fc",),
                "blocks.{i}.mlp.down": ("transformer.h.{i}.mlp.c_proj",),
                "norm": ("transformer.ln_f",),
                "head": ("lm_head",),
            },
            keys={
                "vocab_size": "vocab_size",
                "hidden_size": "n_embd",
                "num_layers": "n_layer",
                "num_heads": "n_head",
                "ffn_size": "n_inner",
                "max_positions": "n_positions",
                "norm_eps": "layer_norm_epsilon",
                "activation": "activation_function",
                "tie_embeddings": "tie_word_embeddings",
                "embedding_dropout": "embd_pdrop",
                "attention_dropout": "attn_pdrop",
                "residual_dropout": "resid_pdrop",
                "initializer_range": "initializer_range",
            },
            fixed={**_BLOOM_LIKE, "position": "learned", "scaled_residual_init": True},
            qkv_layout="side_by_side",
            transposed=True,
            refused={
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "reorder_and_upcast_attn": False,
                "add_cross_attention": False,
            },
        ),
        Family(
            name="gpt_neox",
            modules={
                "embedding": ("gpt_neox.embed_in",),
                "blocks.{i}.attention_norm": ("gpt_neox.layers.{i}.input_layernorm",),
                "blocks.{i}.attention.qkv": ("gpt_neox.layers.{i}.attention.query_key_value",),
                "blocks.{i}.attention.output": ("gpt_neox.layers.{i}.attention.dense",),
                "blocks.{i}.mlp_norm": ("gpt_neox.layers.{i}.post_attention_layernorm",),
                "blocks.{i}.mlp.up": ("gpt_neox.layers.{i}.mlp.dense_h_to_4h",),
                "blocks.{i}.mlp.down": ("gpt_neox.layers.{i}.mlp.dense_4h_to_h",),
                "norm": ("gpt_neox.final_layer_norm",),
                "head": ("embed_out",),
            },
            keys={
                "vocab_size": "vocab_size",
                "hidden_size": "hidden_size",
                "num_layers": "num_hidden_layers",
                "num_heads": "num_attention_heads",
                "ffn_size": "intermediate_size",
                "max_positions": "max_position_embeddings",
                "norm_eps": "layer_norm_eps",
                "activation": "hidden_act",
                "parallel_residual": "use_parallel_residual",
                "qkv_bias": "attention_bias",
                "output_bias": "attention_bias",
                "tie_embeddings": "tie_word_embeddings",
                "attention_dropout": "attention_dropout",
                "residual_dropout": "hidden_dropout",
                "embedding_dropout": "hidden_dropout",
                "initializer_range": "initializer_range",
            },
            fixed={"norm": "layernorm", "gated": False, "mlp_bias": True, "position": "rope"},
            qkv_layout="interleaved",
        ),
        Family(
            name="bloom",
            modules={
                "embedding": ("transformer.word_embeddings",),
                "embedding_norm": ("transformer.word_embeddings_layernorm",),
                "blocks.{i}.attention_norm": ("transformer.h.{i}.input_layernorm",),
                "blocks.{i}.attention.qkv": ("transformer.h.{i}.self_attention.query_key_value",),
                "blocks.{i}.attention.output": ("transformer.h.{i}.self_attention.dense",),
                "blocks.{i}.mlp_norm": ("transformer.h.{i}.post_attention_layernorm",),
                "blocks.{i}.mlp.up": ("transformer.h.{i}.mlp.dense_h_to_4h",),
                "blocks.{i}.mlp.down": ("transformer.h.{i}.mlp.dense_4h_to_h",),
                "norm": ("transformer.ln_f",),
                "head": ("lm_head",),
            },
            keys={
                "vocab_size": "vocab_size",
                "hidden_size": "hidden_size",
                "num_layers": "n_layer",
                "num_heads": "n_head",
                "norm_eps": "layer_norm_epsilon",
                "tie_embeddings": "tie_word_embeddings",
                "attention_dropout": "attention_dropout",
                "residual_dropout": "hidden_dropout",
                "initializer_range": "initializer_range",
            },
            fixed={
                **_BLOOM_LIKE,
                "position": "alibi",
                "activation": "gelu_bloom",
                "embedding_norm": True,
                "max_positions": 2048,
            },
            qkv_layout="interleaved",
            refused={"apply_residual_connection_post_layernorm": False},
        ),
    )
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


def family_named(name: str) -> Family:
    """The family of this ``model_type``.

    Raises:
        ValueError: for an unknown one, naming those that are known.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"unknown architecture {name!r}: the decoder knows {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]


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
    values = {**_DEFAULTS, **_DEFAULTS_BY_FAMILY.get(family.name, {}), **_present(values)}
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
    fields["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else ()
    for name in ("vocab_size", "num_layers", "max_positions"):
        _required(fields, name, family)
    return ModelConfig(family=family.name, **fields)  # type: ignore[arg-type]


def _present(values: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in values.items() if value is not None}


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
