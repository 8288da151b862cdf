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
GPT = {"vocab_size": 97, "n_layer": 2, "hidden_size": 40, "n_head": 5}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
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
}


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
                middle = 1.0 if parameter.dim() == 1 and kind != "gemma3_text" else 0.0
                parameter.normal_(middle, 0.2)
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
