"""Falcon (Almazrouei et al. 2023): multi-query attention in parallel blocks, rotary positions.

Falcon-7B has one KV head and one norm for both layers of a block, Falcon-40B several KV heads and
two norms; models without parallel blocks have a norm in front of each layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from colrow.models.config import ModelConfig
from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm, GGUFNumber

_BLOCK = "transformer.h.{i}"
_NORM, _SECOND = "blocks.{i}.attention_norm", "blocks.{i}.mlp_norm"
_SWITCHES = ("new_decoder_architecture", "multi_query", "parallel_attn")


@dataclass(frozen=True)
class Falcon(Family):
    """Falcon, with three switches for its block."""

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """KV heads and norms, as the switches say."""
        for key in _SWITCHES:
            if not isinstance(values.get(key), bool):
                raise ValueError(f"{key}={values.get(key)!r}: must be true or false")
        new, multi_query, parallel = (values[key] for key in _SWITCHES)
        norms = values.get("num_ln_in_parallel_attn", 2 if new else None)
        if new and not parallel:
            raise ValueError("falcon with new_decoder_architecture has parallel blocks alone")
        if norms not in (None, 1, 2) or (norms == 2 and parallel and not new):
            raise ValueError(
                f"falcon with num_ln_in_parallel_attn={norms!r} and new_decoder_architecture={new} "
                "is not supported"
            )
        if not new:
            fields["num_kv_heads"] = 1 if multi_query else fields["num_heads"]
        fields["parallel_residual"] = parallel
        fields["one_norm"] = parallel and norms != 2
        super().complete(fields, values)

    def modules_of(self, config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
        """Norms have other names in each kind of block."""
        block = config.blocks[0]
        names = {_NORM: f"{_BLOCK}.input_layernorm", _SECOND: f"{_BLOCK}.post_attention_layernorm"}
        if block.parallel_residual and not block.one_norm:
            names = {_NORM: f"{_BLOCK}.ln_attn", _SECOND: f"{_BLOCK}.ln_mlp"}
        return {**self.modules, **{name: (file,) for name, file in names.items()}}

    def gguf_modules_of(self, config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
        """Of two norms the MLP's has the name of the only one."""
        modules = dict(super().gguf_modules_of(config))
        if not config.blocks[0].one_norm:
            modules |= {_NORM: ("blk.{i}.attn_norm_2",), _SECOND: ("blk.{i}.attn_norm",)}
        return modules

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """The newer form where there are several KV heads or two norms."""
        super().spell(values, fields)
        parallel, one_norm = fields["parallel_residual"], fields["one_norm"]
        whole = fields["num_kv_heads"] in (1, fields["num_heads"])
        new = parallel and (not one_norm or not whole)
        values |= {
            "new_decoder_architecture": new,
            "parallel_attn": parallel,
            "multi_query": fields["num_kv_heads"] == 1,
            "alibi": False,
        }
        if new:
            values["num_ln_in_parallel_attn"] = 1 if one_norm else 2

    def complete_gguf(
        self, fields: dict[str, Any], number: GGUFNumber, names: Collection[str]
    ) -> None:
        """A second norm where there is one."""
        fields["one_norm"] = "blk.0.attn_norm_2.weight" not in names


FAMILY = Falcon(
    name="falcon",
    architecture="FalconForCausalLM",
    modules={
        "embedding": ("transformer.word_embeddings",),
        "blocks.{i}.attention.qkv": (f"{_BLOCK}.self_attention.query_key_value",),
        "blocks.{i}.attention.output": (f"{_BLOCK}.self_attention.dense",),
        "blocks.{i}.mlp.up": (f"{_BLOCK}.mlp.dense_h_to_4h",),
        "blocks.{i}.mlp.down": (f"{_BLOCK}.mlp.dense_4h_to_h",),
        "norm": ("transformer.ln_f",),
        "head": ("lm_head",),
    },
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_kv_heads",
        "ffn_size": "ffn_hidden_size",
        "max_positions": "max_position_embeddings",
        "norm_eps": "layer_norm_epsilon",
        "activation": "activation",
        "qkv_bias": "bias",
        "output_bias": "bias",
        "mlp_bias": "bias",
        "tie_embeddings": "tie_word_embeddings",
        "initializer_range": "initializer_range",
    },
    fixed={"norm": "layernorm", "gated": False, "position": "rope"},
    aliases={"n_embed": "hidden_size"},
    defaults={
        "activation": "gelu",
        "bias": False,
        "max_position_embeddings": 2048,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "tie_word_embeddings": True,
    },
    reads=frozenset({"parallel_attn"}),
    refused={"alibi": False, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    fused="interleaved",
    gguf=GGUFForm(
        "falcon",
        {
            **{k: v for k, v in llama.GGUF_MODULES.items() if k not in (_SECOND, "positions")},
            "blocks.{i}.attention.qkv": ("blk.{i}.attn_qkv",),
            "blocks.{i}.mlp.up": ("blk.{i}.ffn_up",),
        },
        {
            "norm": "layernorm",
            "gated": False,
            "position": "rope",
            "activation": "gelu",
            "parallel_residual": True,
        },
        windows=False,
    ),
)
