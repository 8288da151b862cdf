"""Mixtral (Jiang et al. 2024): Mistral with a mixture of experts in place of each MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colrow.models.config_limits import check_whole
from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm
from colrow.models.hf_rope import RopeKeys

_SPARSE = "model.layers.{i}.block_sparse_moe"


def _experts(
    modules: dict[str, tuple[str, ...]], router: str, up: tuple[str, ...], down: str
) -> dict[str, tuple[str, ...]]:
    """The names with those of the experts in place of the MLP's."""
    mlp = ("blocks.{i}.mlp.up", "blocks.{i}.mlp.down")
    return {name: files for name, files in modules.items() if name not in mlp} | {
        "blocks.{i}.mlp.router": (router,),
        "blocks.{i}.mlp.experts.{e}.up": up,
        "blocks.{i}.mlp.experts.{e}.down": (down,),
    }


@dataclass(frozen=True)
class Mixtral(Family):
    """Mixtral, which always has experts."""

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Refuses a configuration without them."""
        super().complete(fields, values)
        for field in ("experts", "active_experts"):
            check_whole(self.keys[field], fields.get(field), 1, 1 << 14)


FAMILY = Mixtral(
    name="mixtral",
    architecture="MixtralForCausalLM",
    modules=_experts(
        llama.MODULES,
        f"{_SPARSE}.gate",
        (f"{_SPARSE}.experts.{{e}}.w1", f"{_SPARSE}.experts.{{e}}.w3"),
        f"{_SPARSE}.experts.{{e}}.w2",
    ),
    keys={
        **llama.KEYS,
        "experts": "num_local_experts",
        "active_experts": "num_experts_per_tok",
    },
    fixed=llama.FIXED,
    aliases={"num_experts": "num_local_experts"},
    windows="always",
    rope=RopeKeys(usual_theta=1e6),
    defaults={
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
    },
    # Of training alone: noise on the router's input, and a loss that balances the experts.
    refused={"router_jitter_noise": 0.0, "output_router_logits": False},
    gguf=GGUFForm(
        "llama",
        _experts(
            llama.GGUF_MODULES,
            "blk.{i}.ffn_gate_inp",
            ("blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps"),
            "blk.{i}.ffn_down_exps",
        ),
        llama.GGUF_FIXED,
        keys={"experts": "expert_count", "active_experts": "expert_used_count"},
        paired_heads=True,
    ),
)
