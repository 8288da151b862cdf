"""One small table per model family: names of its weights, and of the keys of its configuration.

Plain Python, no torch. A new family of the same building blocks is a new table, not new code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from colrow.files import shown

FusedLayout = Literal["separate", "side_by_side", "interleaved"]
Windowed = Literal["never", "always", "by_layer"]


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
        aliases: other spellings of keys, which published configurations use, to the key.
        fixed: fields that are the same for every model of the family.
        windows: which layers the key ``sliding_window`` is about: none, all (or those that
            ``layer_types`` names, where it is there), or those that ``layer_types`` or
            ``max_window_layers`` name when ``use_sliding_window`` is set.
        defaults: what is assumed for keys that a configuration leaves out, and only then: a key
            that is null stays unset.
        refused: key to the only value that is supported.
    """

    name: str
    modules: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str]
    fixed: Mapping[str, object]
    qkv_layout: FusedLayout = "separate"
    transposed: bool = False
    windows: Windowed = "never"
    defaults: Mapping[str, object] = field(default_factory=dict)
    refused: Mapping[str, object] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


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
            keys={
                **_LLAMA_KEYS,
                "qkv_bias": "attention_bias",
                "output_bias": "attention_bias",
                "mlp_bias": "mlp_bias",
            },
            fixed=_LLAMA_FIXED,
        ),
        Family(
            name="mistral",
            modules=_LLAMA_MODULES,
            keys=_LLAMA_KEYS,
            fixed=_LLAMA_FIXED,
            windows="always",
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Family(
            name="qwen2",
            modules=_LLAMA_MODULES,
            keys=_LLAMA_KEYS,
            fixed={**_LLAMA_FIXED, "qkv_bias": True},
            windows="by_layer",
            defaults={"num_key_value_heads": 32},
        ),
        Family(
            name="qwen3",
            modules=_LLAMA_MODULES,
            keys={**_LLAMA_KEYS, "qkv_bias": "attention_bias", "output_bias": "attention_bias"},
            fixed={**_LLAMA_FIXED, "qk_norm": True},
            windows="by_layer",
            defaults={"num_key_value_heads": 32, "head_dim": 128},
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
            aliases={
                "hidden_size": "n_embd",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "max_position_embeddings": "n_positions",
            },
            fixed={**_BLOOM_LIKE, "position": "learned", "scaled_residual_init": True},
            defaults={"tie_word_embeddings": True, "n_positions": 1024},
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
            defaults={
                "attention_bias": True,
                "hidden_act": "gelu",
                "rotary_pct": 0.25,
                "use_parallel_residual": True,
            },
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
            aliases={
                "n_embed": "hidden_size",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
            },
            fixed={
                **_BLOOM_LIKE,
                "position": "alibi",
                "activation": "gelu_bloom",
                "embedding_norm": True,
                "max_positions": 2048,
            },
            defaults={"tie_word_embeddings": True},
            qkv_layout="interleaved",
            refused={"apply_residual_connection_post_layernorm": False},
        ),
    )
}


def family_named(name: str) -> Family:
    """The family of this ``model_type``.

    Raises:
        ValueError: for an unknown one, naming those that are known.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"unknown architecture {shown(name)}: the decoder knows {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]
