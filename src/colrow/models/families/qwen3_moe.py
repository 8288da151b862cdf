"""Qwen3's mixtures of experts (Yang et al. 2025): Qwen3 with experts in all layers, or in some."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from colrow.files import shown
from colrow.layers.describe import Routing
from colrow.models.config_limits import SIZES, check_whole
from colrow.models.families import llama
from colrow.models.families.family import GGUFForm, GGUFNumber
from colrow.models.families.mixtures import (
    ROUTER_LOSS_KEYS,
    Mixture,
    gguf_with_experts,
    with_experts,
)

_MLP = "model.layers.{i}.mlp"


@dataclass(frozen=True)
class Qwen3Moe(Mixture):
    """Qwen3-MoE, whose layers without experts two keys name."""

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Which layers have experts, and whether weights are divided by their sum."""
        super().complete(fields, values)
        layers, listed = fields["num_layers"], values.get("mlp_only_layers") or []
        step, normalised = values["decoder_sparse_step"], values["norm_topk_prob"]
        check_whole("decoder_sparse_step", step, 1, SIZES["num_layers"])
        if not isinstance(listed, list):
            raise ValueError(f"mlp_only_layers={shown(listed)}: must be a list of layers")
        if not isinstance(normalised, bool):
            raise ValueError(f"norm_topk_prob={shown(normalised)}: must be true or false")
        fields["dense_layers"] = tuple(n for n in range(layers) if n in listed or (n + 1) % step)
        if len(fields["dense_layers"]) == layers:
            raise ValueError(
                f"decoder_sparse_step={step} and mlp_only_layers={shown(listed)} leave no layer "
                "with experts: such a model is of model_type qwen3"
            )
        fields["routing"] = Routing(normalised=normalised)

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """Layers without experts are listed one by one."""
        super().spell(values, fields)
        values["decoder_sparse_step"] = 1
        values["mlp_only_layers"] = list(fields["dense_layers"])
        values["norm_topk_prob"] = fields["routing"].normalised

    def complete_gguf(
        self, fields: dict[str, Any], number: GGUFNumber, names: Collection[str]
    ) -> None:
        """llama.cpp divides the weights by their sum, and has experts in every layer."""
        fields["routing"] = Routing(normalised=True)


FAMILY = Qwen3Moe(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    modules=with_experts(
        llama.MODULES,
        f"{_MLP}.gate",
        (f"{_MLP}.experts.{{e}}.gate_proj", f"{_MLP}.experts.{{e}}.up_proj"),
        f"{_MLP}.experts.{{e}}.down_proj",
        dense=True,
    ),
    keys={
        **llama.KEYS,
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
        "experts": "num_experts",
        "active_experts": "num_experts_per_tok",
        "expert_ffn_size": "moe_intermediate_size",
    },
    fixed={**llama.FIXED, "qk_norm": "each_head"},
    aliases={"num_local_experts": "num_experts"},
    windows="by_layer",
    defaults={
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    reads=ROUTER_LOSS_KEYS | {"decoder_sparse_step", "mlp_only_layers", "norm_topk_prob"},
    gguf=GGUFForm(
        "qwen3moe",
        gguf_with_experts(llama.GGUF_MODULES, dense=False),
        {**llama.GGUF_FIXED, "qk_norm": "each_head"},
        keys={
            "experts": "expert_count",
            "active_experts": "expert_used_count",
            "expert_ffn_size": "expert_feed_forward_length",
        },
    ),
)
