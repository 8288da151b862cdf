"""DeepSeek-V3 and R1 (DeepSeek-AI 2024, arXiv 2412.19437): latent attention, many small experts.

What is known of DeepSeek-V2 too stands here: the two differ in how their routers choose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colrow.files import shown
from colrow.layers.describe import Routing
from colrow.layers.options import RopeConfig
from colrow.models.config_limits import SIZES, check_number, check_whole
from colrow.models.families import llama
from colrow.models.families.mixtures import Mixture, with_experts
from colrow.models.hf_rope import RopeKeys, rope_config, spelled_rope, yarn_magnitude

_ATTENTION, _MLP = "model.layers.{i}.self_attn", "model.layers.{i}.mlp"
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_ROUTER = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
_LAYERS = ("first_k_dense_replace", "n_shared_experts")

MODULES = {
    **with_experts(
        llama.MODULES,
        f"{_MLP}.gate",
        (f"{_MLP}.experts.{{e}}.gate_proj", f"{_MLP}.experts.{{e}}.up_proj"),
        f"{_MLP}.experts.{{e}}.down_proj",
        dense=True,
    ),
    "blocks.{i}.attention.q": (f"{_ATTENTION}.q_proj",),
    "blocks.{i}.attention.q_down": (f"{_ATTENTION}.q_a_proj",),
    "blocks.{i}.attention.q_norm": (f"{_ATTENTION}.q_a_layernorm",),
    "blocks.{i}.attention.q_up": (f"{_ATTENTION}.q_b_proj",),
    "blocks.{i}.attention.kv_down": (f"{_ATTENTION}.kv_a_proj_with_mqa",),
    "blocks.{i}.attention.kv_norm": (f"{_ATTENTION}.kv_a_layernorm",),
    "blocks.{i}.attention.kv_up": (f"{_ATTENTION}.kv_b_proj",),
    "blocks.{i}.mlp.router.correction": (f"{_MLP}.gate.e_score_correction_bias",),
    "blocks.{i}.mlp.shared.up": (
        f"{_MLP}.shared_experts.gate_proj",
        f"{_MLP}.shared_experts.up_proj",
    ),
    "blocks.{i}.mlp.shared.down": (f"{_MLP}.shared_experts.down_proj",),
}
KEYS = {
    **{field: key for field, key in llama.KEYS.items() if field != "head_dim"},
    "experts": "n_routed_experts",
    "active_experts": "num_experts_per_tok",
    "expert_ffn_size": "moe_intermediate_size",
}
# Heads have several sizes, which keys of their own say.
FIXED = {**llama.FIXED, "head_dim": 1}
READS = frozenset((*_LATENT, *_ROUTER, *_LAYERS, "head_dim"))
REFUSED = {"attention_bias": False, "moe_layer_freq": 1}
ROPE = RopeKeys(interleaved=True)


@dataclass(frozen=True)
class DeepSeek(Mixture):
    """DeepSeek's mixtures, with what they say in keys of their own."""

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Latent attention and its scale, first layers without experts, shared ones, the router."""
        layers, heads = fields["num_layers"], fields["num_heads"]
        sizes = tuple(values.get(key) or 0 for key in _LATENT)
        for key, size in zip(_LATENT, sizes, strict=True):
            check_whole(key, size, int(key != "q_lora_rank"), SIZES["hidden_size"])
        if fields["num_kv_heads"] != heads:
            raise ValueError(
                f"num_key_value_heads={fields['num_kv_heads']}: the {heads} heads of latent "
                f"attention have keys of their own, so it must be {heads} too"
            )
        _, _, nope, rotated, _ = fields["latent"] = sizes
        fields["head_dim"] = nope + rotated
        fields["rope"] = rope_config(values, rotated, self.rope_keys(values), self.name)
        fields["attention_scale"] = _score_scale(values, nope + rotated)
        super().complete(fields, values)
        first, shared = (values[key] for key in _LAYERS)
        check_whole("first_k_dense_replace", first, 0, SIZES["num_layers"])
        check_whole("n_shared_experts", shared, 0, 1 << 14)
        if first >= layers:
            raise ValueError(
                f"first_k_dense_replace={first} leaves none of the {layers} layers with experts"
            )
        fields["dense_layers"] = tuple(range(first))
        fields["shared_ffn_size"] = shared * fields["expert_ffn_size"]
        check_number("routed_scaling_factor", values["routed_scaling_factor"])
        fields["routing"] = self.routing(values)

    def rope_keys(self, values: Mapping[str, Any]) -> RopeKeys:
        """How rotary positions are spelled."""
        return self.rope

    def routing(self, values: Mapping[str, Any]) -> Routing:
        """How experts are chosen."""
        raise NotImplementedError

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """The way back."""
        values |= dict(zip(_LATENT, fields["latent"], strict=True))
        values["q_lora_rank"] = values["q_lora_rank"] or None
        rotated, routing = values["qk_rope_head_dim"], fields["routing"]
        super().spell(values, fields)
        values["rope_parameters"] = _spelled(fields["rope"], fields["attention_scale"], fields)
        values["head_dim"] = rotated
        values["first_k_dense_replace"] = len(fields["dense_layers"])
        values["n_shared_experts"] = fields["shared_ffn_size"] // fields["expert_ffn_size"]
        values["routed_scaling_factor"] = routing.scale
        values["norm_topk_prob"] = routing.normalised
        values["n_group"], values["topk_group"] = routing.groups, routing.active_groups


def _score_scale(values: Mapping[str, Any], key_size: int) -> float | None:
    """What scores are multiplied by, where positions are stretched and say so."""
    table = values.get("rope_parameters") or values.get("rope_scaling") or {}
    stretched = table.get("rope_type") or table.get("type") or "default"
    scale, factor = table.get("mscale_all_dim"), table.get("factor")
    if stretched == "default" or not scale or factor is None:
        return None
    check_number("mscale_all_dim", scale)
    return float(key_size**-0.5 * yarn_magnitude(factor, scale) ** 2)


def _spelled(rope: RopeConfig, scale: float | None, fields: Mapping[str, Any]) -> dict[str, object]:
    """The table of rotary positions, with the number that the scale of scores follows from."""
    table = spelled_rope(rope, rope.dims)
    if scale is not None:
        stretch = math.sqrt(scale * math.sqrt(fields["head_dim"]))
        table["mscale_all_dim"] = round((stretch - 1) / (0.1 * math.log(rope.factor)), 12)
    return table


@dataclass(frozen=True)
class DeepSeekV3(DeepSeek):
    """DeepSeek-V3, whose router scores by sigmoids and is balanced by corrections."""

    def rope_keys(self, values: Mapping[str, Any]) -> RopeKeys:
        """Pairs that rotate are neighbours, unless a key says otherwise."""
        interleaved = values["rope_interleave"]
        if not isinstance(interleaved, bool):
            raise ValueError(f"rope_interleave={shown(interleaved)}: must be true or false")
        return RopeKeys(interleaved=interleaved)

    def routing(self, values: Mapping[str, Any]) -> Routing:
        """A group's score is the sum of its two best."""
        if not isinstance(values["norm_topk_prob"], bool):
            raise ValueError(
                f"norm_topk_prob={shown(values['norm_topk_prob'])}: must be true or false"
            )
        for key in ("n_group", "topk_group"):
            check_whole(key, values[key], 1, 1 << 14)
        return Routing(
            "sigmoid",
            normalised=values["norm_topk_prob"],
            scale=float(values["routed_scaling_factor"]),
            correction=True,
            groups=values["n_group"],
            active_groups=values["topk_group"],
            best_of_group=2,
            wide=True,
        )

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """With how pairs rotate."""
        super().spell(values, fields)
        values["rope_interleave"] = fields["rope"].interleaved


FAMILY = DeepSeekV3(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    modules=MODULES,
    keys=KEYS,
    fixed=FIXED,
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    rope=ROPE,
    defaults={
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "rope_interleave": True,
    },
    reads=READS | {"rope_interleave"},
    later_layers=True,  # which predict further tokens
    refused={**REFUSED, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
)
