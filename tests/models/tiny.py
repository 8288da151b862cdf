"""Tiny random models of every family, made and evaluated by transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colrow.checkpoint.naming import hf_naming
from colrow.models.hf_config import config_from_hf
from colrow.verification.reference import (
    precision,
    prepare_reference,
    quiet_transformers,
    reference_grads,
)
from tests.devices import moved

SIZES = {"vocab_size": 97, "hidden_size": 40, "num_hidden_layers": 2, "intermediate_size": 101}
ONE_KV = {"num_attention_heads": 5, "num_key_value_heads": 1}
TWO_KV = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 48}
THREE_KV = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}
WIDE = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
GPT = {"vocab_size": 97, "n_layer": 2, "hidden_size": 40, "n_head": 5}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}
DEEPSEEK = {
    **SIZES,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "n_routed_experts": 6,
    "n_group": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 23,
    "routed_scaling_factor": 1.5,
}
# One layer, as a config.json: the smallest that is loaded.
SMALLEST: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}

# name: (model_type, keys of the configuration). Odd sizes on purpose.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**SIZES, **ONE_KV, "tie_word_embeddings": False}),
    "llama-biased-tied": (
        "llama",
        {
            **SIZES,
            **TWO_KV,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "mistral-window": ("mistral", {**SIZES, **ONE_KV, "head_dim": 8, "sliding_window": 7}),
    "qwen2": ("qwen2", {**SIZES, **THREE_KV, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**SIZES, **TWO_KV, "head_dim": 6, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", {**GPT, "n_embd": 40, "n_inner": 101, "n_positions": 64}),
    "gpt2-untied": ("gpt2", {**GPT, "n_embd": 40, "n_positions": 64, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {**SIZES, "num_attention_heads": 5}),
    "gpt_neox-serial": (
        "gpt_neox",
        {
            **SIZES,
            "num_attention_heads": 5,
            "use_parallel_residual": False,
            "attention_bias": False,
        },
    ),
    "bloom": ("bloom", GPT),
    "phi3": (
        "phi3",
        {**SIZES, **TWO_KV, "hidden_size": 64, "sliding_window": 7, "partial_rotary_factor": 0.5},
    ),
    "olmo2": ("olmo2", {**SIZES, **THREE_KV}),
    "gemma3": (
        "gemma3_text",
        {
            **SIZES,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "query_pre_attn_scalar": 12,
            "sliding_window": 7,
            "sliding_window_pattern": 3,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,  # tied, so small a model only repeats itself
        },
    ),
    "gemma2": (
        "gemma2",
        {
            **SIZES,
            **ONE_KV,
            "head_dim": 8,
            "query_pre_attn_scalar": 12,
            "sliding_window": 7,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
        },
    ),
    "phi4": (
        "phi3",
        {
            **SIZES,
            **TWO_KV,
            "hidden_size": 64,
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.0, 1.5, 4.0],
            },
            "tie_word_embeddings": True,
        },
    ),
    "granite": (
        "granite",
        {
            **SIZES,
            **THREE_KV,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "logits_scaling": 5.0,
            "rope_parameters": YARN_ROPE,
        },
    ),
    "cohere": (
        "cohere",
        {**SIZES, **THREE_KV, "logit_scale": 0.25, "attention_bias": True, "use_qk_norm": True},
    ),
    "cohere2": (
        "cohere2",
        {
            **SIZES,
            **ONE_KV,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 7,
        },
    ),
    "falcon": (
        "falcon",
        {**WIDE, "num_attention_heads": 5, "ffn_hidden_size": 101, "bias": True},
    ),
    "falcon-new": (
        "falcon",
        {
            **WIDE,
            "hidden_size": 48,
            "num_attention_heads": 8,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "tie_word_embeddings": False,
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "falcon-serial": (
        "falcon",
        {**WIDE, "num_attention_heads": 5, "multi_query": False, "parallel_attn": False},
    ),
    "starcoder2": ("starcoder2", {**SIZES, **ONE_KV, "sliding_window": 7}),
    "glm": ("glm", {**SIZES, **TWO_KV, "head_dim": 8}),
    "glm4": ("glm4", {**SIZES, **ONE_KV, "head_dim": 8, "attention_bias": False}),
    "smollm3": (
        "smollm3",
        {**SIZES, **THREE_KV, "no_rope_layer_interval": 2, "mlp_bias": True},
    ),
    "mixtral": (
        "mixtral",
        {
            **SIZES,
            **ONE_KV,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.3,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **SIZES,
            **TWO_KV,
            "num_hidden_layers": 4,
            "head_dim": 6,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 23,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "topk_group": 1,
            "num_experts_per_tok": 2,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "q_lora_rank": 11,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **SIZES,
            **TWO_KV,
            "head_dim": 6,
            "intermediate_size": 29,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "swiglu_limit": 0.5,
            "rope_parameters": {**YARN, "truncate": False},
            "output_router_logits": True,
            "router_aux_loss_coef": 0.3,
        },
    ),
}

# Families whose layers are compared alone on every number of ranks: whole models take turns.
_BY_TURNS = [
    *("gemma2", "phi4", "granite", "cohere", "cohere2", "falcon", "falcon-new", "falcon-serial"),
    *("starcoder2", "glm", "glm4", "smollm3"),
]


def at(ranks: int) -> list[str]:
    """The names to run on so many ranks: some on 1 and 3, some on 2 and 4, most on all."""
    turn = {name: number % 2 for number, name in enumerate(_BY_TURNS)}
    return [name for name in CASES if turn.get(name, ranks % 2) == ranks % 2]


def batch() -> Tensor:
    """Three rows of 17 tokens: neither divides by 2 or 4."""
    generator = torch.Generator().manual_seed(1)
    return moved(torch.randint(0, 97, (3, 17), generator=generator, device="cpu"))


@dataclass(frozen=True)
class Expected:
    """What transformers computes for one model and batch."""

    logits: Tensor
    loss: Tensor
    grads: dict[str, Tensor]


def make(name: str, directory: Path) -> torch.nn.Module:
    """Creates the model, saves it in ``directory`` in fp64, returns it."""
    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM

        kind, keys = CASES[name]
        config = AutoConfig.for_model(kind, bos_token_id=0, eos_token_id=1, pad_token_id=0, **keys)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                # Gemma's norms hold what is added to 1.
                middle = 1.0 if parameter.dim() == 1 and not kind.startswith("gemma") else 0.0
                parameter.normal_(middle, 0.2)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(0.0, 0.2)
        model.save_pretrained(directory)
    return prepare_reference(model)


def evaluate(model: torch.nn.Module, ids: Tensor, dtype: torch.dtype) -> Expected:
    """Logits, loss and gradients of the unsplit model in ``dtype``."""
    model = model.to(dtype)
    model.zero_grad()
    with precision(dtype):
        result = model(input_ids=ids, labels=ids)
        result.loss.backward()
    naming = hf_naming(config_from_hf(model.config.to_dict()))
    grads = {name: grad.clone() for name, grad in reference_grads(model, naming).items()}
    return Expected(result.logits.detach(), result.loss.detach(), grads)
