"""Mixtral (Jiang et al. 2024): Mistral with a mixture of experts in place of each MLP."""

from __future__ import annotations

from colrow.models.families import llama
from colrow.models.families.family import GGUFForm
from colrow.models.families.mixtures import (
    ROUTER_LOSS_KEYS,
    Mixture,
    gguf_with_experts,
    with_experts,
)
from colrow.models.hf_rope import RopeKeys

_SPARSE = "model.layers.{i}.block_sparse_moe"

FAMILY = Mixture(
    name="mixtral",
    architecture="MixtralForCausalLM",
    modules=with_experts(
        llama.MODULES,
        f"{_SPARSE}.gate",
        (f"{_SPARSE}.experts.{{e}}.w1", f"{_SPARSE}.experts.{{e}}.w3"),
        f"{_SPARSE}.experts.{{e}}.w2",
        dense=False,
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
        "router_aux_loss_coef": 0.001,
    },
    reads=ROUTER_LOSS_KEYS,
    refused={"router_jitter_noise": 0.0},  # of training alone: noise on the router's input
    gguf=GGUFForm(
        "llama",
        gguf_with_experts(llama.GGUF_MODULES, dense=False),
        llama.GGUF_FIXED,
        keys={"experts": "expert_count", "active_experts": "expert_used_count"},
        paired_heads=True,
    ),
)
