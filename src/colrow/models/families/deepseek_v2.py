"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024, arXiv 2405.04434)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colrow.files import shown
from colrow.layers.describe import Routing
from colrow.models.config_limits import check_whole
from colrow.models.families import deepseek_v3
from colrow.models.families.deepseek_v3 import DeepSeek

_GREEDY, _LIMITED = "greedy", "group_limited_greedy"


@dataclass(frozen=True)
class DeepSeekV2(DeepSeek):
    """DeepSeek-V2, whose router scores by softmax and takes weights as they are."""

    def routing(self, values: Mapping[str, Any]) -> Routing:
        """A group's score is its best."""
        method = values["topk_method"]
        if method not in (_GREEDY, _LIMITED):
            raise ValueError(
                f"deepseek_v2 with topk_method={shown(method)} is not supported: {_GREEDY} and "
                f"{_LIMITED} are"
            )
        groups, active = 1, 1
        if method == _LIMITED:
            groups, active = values.get("n_group", 0), values.get("topk_group", 0)
            check_whole("n_group", groups, 1, 1 << 14)
            check_whole("topk_group", active, 1, 1 << 14)
        return Routing(
            normalised=False,
            scale=float(values["routed_scaling_factor"]),
            groups=groups,
            active_groups=active,
            wide=True,
        )

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """With the name of how experts are chosen."""
        super().spell(values, fields)
        values["topk_method"] = _LIMITED if fields["routing"].groups > 1 else _GREEDY


FAMILY = DeepSeekV2(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    modules=deepseek_v3.MODULES,
    keys=deepseek_v3.KEYS,
    fixed=deepseek_v3.FIXED,
    aliases={"num_experts": "n_routed_experts"},
    rope=deepseek_v3.ROPE,
    defaults={
        "n_routed_experts": 64,
        "moe_intermediate_size": 1407,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "first_k_dense_replace": 0,
        "topk_method": _GREEDY,
    },
    reads=deepseek_v3.READS | {"topk_method"},
    # transformers' model takes the weights as they are, whatever norm_topk_prob says.
    refused={
        **deepseek_v3.REFUSED,
        "mlp_bias": False,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
    },
)
