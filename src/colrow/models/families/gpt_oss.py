"""gpt-oss (OpenAI 2025, arXiv 2508.10925): sinks, windows in every other layer, biased experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colrow.layers.describe import Routing
from colrow.layers.options import ClampedGate
from colrow.models.config_limits import check_number
from colrow.models.families import llama
from colrow.models.families.mixtures import ROUTER_LOSS_KEYS, Mixture, with_experts
from colrow.models.hf_rope import RopeKeys

_MLP = "model.layers.{i}.mlp"
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class GptOss(Mixture):
    """gpt-oss, whose defaults are settings of their own."""

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Windows by layer, and what the gate is clamped to."""
        if not values.get("rope_parameters") and not values.get("rope_scaling"):
            values = {**values, "rope_parameters": _ROPE}
        super().complete(fields, values)
        window, layers = values.get("sliding_window"), fields["num_layers"]
        kinds = values.get("layer_types") or [_GLOBAL if n % 2 else _LOCAL for n in range(layers)]
        if window is None and _LOCAL in kinds:
            raise ValueError(
                "gpt_oss with sliding_window=null has layers of sliding_attention and no window "
                "for them: set it, or name full_attention alone in layer_types"
            )
        fields["windows"] = tuple(window if kind == _LOCAL else None for kind in kinds)
        alpha, limit = values["swiglu_alpha"], values["swiglu_limit"]
        check_number("swiglu_alpha", alpha)
        check_number("swiglu_limit", limit)
        fields["clamped"] = ClampedGate(float(alpha), float(limit))

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """As transformers writes it."""
        super().spell(values, fields)
        windows = fields["windows"] or (None,) * fields["num_layers"]
        values["layer_types"] = [_LOCAL if window else _GLOBAL for window in windows]
        values["swiglu_alpha"] = fields["clamped"].alpha
        values["swiglu_limit"] = fields["clamped"].limit


FAMILY = GptOss(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    modules={
        **with_experts(llama.MODULES, f"{_MLP}.router", (), "", dense=False),
        "blocks.{i}.attention.sinks.weight": (f"{llama.ATTENTION}.sinks",),
        "blocks.{i}.mlp.experts.up.weight": (f"{_MLP}.experts.gate_up_proj",),
        "blocks.{i}.mlp.experts.up.bias": (f"{_MLP}.experts.gate_up_proj_bias",),
        "blocks.{i}.mlp.experts.down.weight": (f"{_MLP}.experts.down_proj",),
        "blocks.{i}.mlp.experts.down.bias": (f"{_MLP}.experts.down_proj_bias",),
    },
    keys={
        **llama.KEYS,
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
        "experts": "num_local_experts",
        "active_experts": "num_experts_per_tok",
    },
    fixed={
        **llama.FIXED,
        "norm_wide": True,
        "sinks": True,
        "mlp_bias": True,
        "routing": Routing("chosen", bias=True),
    },
    transposed="experts",
    alternating=True,
    aliases={"num_experts": "num_local_experts"},
    windows="own",
    rope=RopeKeys(usual_theta=150000.0),
    quantised=frozenset({"mxfp4"}),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "router_aux_loss_coef": 0.001,
    },
    reads=ROUTER_LOSS_KEYS | {"swiglu_alpha", "swiglu_limit", "layer_types"},
)
