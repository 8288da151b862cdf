"""Random checkpoints of the decoder's families, and transformers' model of the same weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.checkpoint.naming import hf_naming
from colrow.models.config import ModelConfig
from colrow.models.hf_config import config_from_hf
from colrow.sharding import Sharding
from colrow.verification.reference import (
    precision,
    prepare_reference,
    quiet_transformers,
    reference_grads,
)
from tests.fuzz.case import Case, NotRunError, OneOf, World
from tests.models.tiny import LLAMA3_ROPE

LIMIT = 1e-10
IGNORED = -100
_POSITIONS = 40
# (query heads, KV heads)
HEADS = [[4, 2], [2, 2], [5, 1], [6, 2], [6, 3], [9, 3], [8, 8], [7, 7], [3, 1], [4, 4], [12, 4]]
ROPES: list[dict[str, Any] | None] = [
    None,
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    LLAMA3_ROPE,
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
]
_LLAMAS = [
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gemma2", "gemma3_text", "granite"),
    *("cohere", "cohere2", "starcoder2", "glm", "glm4", "smollm3", "mixtral"),
]
FAMILIES = [*_LLAMAS, "falcon", "gpt2", "gpt_neox", "bloom"]
_OWN_WIDTH = {"llama", "mistral", "qwen3", "gemma2", "gemma3_text", "glm", "glm4"}

MODEL = {
    "family": OneOf(FAMILIES),
    "heads": OneOf(HEADS),
    "head_dim": OneOf([4, 6, 8]),
    "own_width": OneOf([0, 1]),
    "layers": OneOf([1, 2, 3]),
    "ffn": OneOf([12, 16, 13, 31, 5]),
    "vocab": OneOf([16, 97, 29, 50]),
    "tied": OneOf([False, True]),
    "biases": OneOf([False, True]),
    "rope": OneOf(ROPES),
    "window": OneOf([None, 3, 1, 100]),
    "activation": OneOf(["silu", "gelu", "relu", "gelu_new", "gelu_pytorch_tanh"]),
    "eps": OneOf([1e-5, 1e-6, 1e-2]),
    "partial": OneOf([0.5, 1.0, 0.25]),
    "parallel_residual": OneOf([True, False]),
    "padding": OneOf([None, 2]),
    "weights": OneOf([0.2, 0.5]),
    "seed": OneOf([0, 1, 2]),
}
# Arguments of Sharding; the last one is refused.
SHARDINGS: list[dict[str, bool]] = [
    {},
    {"sequence_parallel": True},
    {"overlap": False},
    {"sequence_parallel": True, "overlap": False},
    {"sequence_parallel": True, "keep_gathered_input": False},
    {"sequence_parallel": True, "keep_gathered_input": False, "overlap": False},
]
LAYOUT = {
    "split": OneOf([[], [2, 1, 1, 1], [1, 1, 3, 2], [2, 3, 2, 2], [0.4, 0.6, 0.3, 0.1]]),
    "sharding": OneOf(SHARDINGS),
    "check_inputs": OneOf([True, False]),
}


def further(case: Case) -> dict[str, Any]:
    """What the configurations of one family have beside those of LLaMA."""
    family, window, biases = case["family"], case["window"], case["biases"]
    half = 0.5 if case["partial"] < 1 and case["head_dim"] != 6 else 1.0
    by_layer = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    windows = {"sliding_window": window or 3}
    gemma = {"hidden_activation": case["activation"], "query_pre_attn_scalar": 7, **windows}
    cohere = {"layer_norm_eps": case["eps"], "logit_scale": 0.3, "attention_bias": biases}
    found: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": biases, "mlp_bias": biases},
        "mistral": {"sliding_window": window},
        "qwen2": by_layer if window else {},
        "qwen3": {"attention_bias": biases, **(by_layer if window else {})},
        "phi3": {"sliding_window": window, "partial_rotary_factor": half, "resid_pdrop": 0.0},
        "olmo2": {"attention_bias": biases},
        "gemma2": {**gemma, "attn_logit_softcapping": 2.0, "final_logit_softcapping": None},
        "gemma3_text": {**gemma, "sliding_window_pattern": 2},
        "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.4, "logits_scaling": 3},
        "cohere": {**cohere, "use_qk_norm": case["tied"]},
        "cohere2": {**cohere, **windows, "sliding_window_pattern": 2},
        "starcoder2": {
            **{"norm_epsilon": case["eps"], "use_bias": biases, "sliding_window": window},
            **dict.fromkeys(("embedding_dropout", "residual_dropout"), 0.0),
        },
        "glm": {"attention_bias": biases, "partial_rotary_factor": half},
        "glm4": {"attention_bias": biases, "partial_rotary_factor": half},
        "smollm3": {"no_rope_layer_interval": 2, "mlp_bias": biases},
        "mixtral": {
            **{"num_local_experts": 3 + biases, "num_experts_per_tok": 2},
            "sliding_window": window,
        },
    }
    return found[family]


def keys_of(case: Case) -> tuple[str, dict[str, Any]]:
    """transformers' name of the model type, and the keys of its configuration."""
    family, (heads, kv_heads), size = case["family"], case["heads"], case["head_dim"]
    width = heads * size
    every = {"vocab_size": case["vocab"], "bos_token_id": 0, "eos_token_id": 1}
    every |= {"pad_token_id": case["padding"], "tie_word_embeddings": case["tied"]}
    if family in _LLAMAS:
        own_width = case["own_width"] if family in _OWN_WIDTH else 0
        if own_width:  # the heads together are not as wide as the residual stream
            width += heads * own_width
        keys = {
            "hidden_size": width,
            "num_hidden_layers": case["layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": size,
            "intermediate_size": case["ffn"],
            "hidden_act": case["activation"],
            "rms_norm_eps": case["eps"],
            "max_position_embeddings": _POSITIONS,
            "attention_dropout": 0.0,
        }
        if case["rope"] and family not in ("phi3", "gemma3_text"):
            keys["rope_parameters"] = dict(case["rope"])  # to which transformers adds
        if family not in _OWN_WIDTH:
            del keys["head_dim"]
        return family, every | keys | further(case)
    if family == "gpt2":
        keys = {
            "n_embd": width,
            "n_layer": case["layers"],
            "n_head": heads,
            "n_inner": None if case["ffn"] == 12 else case["ffn"],
            "activation_function": case["activation"],
            "layer_norm_epsilon": case["eps"],
            "n_positions": _POSITIONS,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        }
    elif family == "falcon":
        grouped = case["parallel_residual"] and case["window"] == 3
        keys = {
            "hidden_size": width,
            "num_hidden_layers": case["layers"],
            "num_attention_heads": heads,
            "num_kv_heads": kv_heads if grouped else heads,  # others transformers does not run
            "ffn_hidden_size": case["ffn"],
            "activation": case["activation"],
            "layer_norm_epsilon": case["eps"],
            "max_position_embeddings": _POSITIONS,
            "bias": case["biases"],
            "parallel_attn": case["parallel_residual"],
            "multi_query": case["window"] is None,
            "new_decoder_architecture": grouped,
        }
    elif family == "gpt_neox":
        keys = {
            "hidden_size": width,
            "num_hidden_layers": case["layers"],
            "num_attention_heads": heads,
            "intermediate_size": case["ffn"],
            "hidden_act": case["activation"],
            "layer_norm_eps": case["eps"],
            "max_position_embeddings": _POSITIONS,
            "use_parallel_residual": case["parallel_residual"],
            "attention_bias": case["biases"],
            "rotary_pct": case["partial"],
        }
    else:
        keys = {
            "hidden_size": width,
            "n_layer": case["layers"],
            "n_head": heads,
            "layer_norm_epsilon": case["eps"],
        }
    return family, every | keys


def make(world: World, case: Case) -> Any:
    """transformers' model in fp64, which rank 0 also writes to the world's directory."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(case["seed"])
        name, keys = keys_of(case)
        try:
            config = AutoConfig.for_model(name, **keys)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        except Exception as error:  # transformers has many
            raise NotRunError(f"transformers: {type(error).__name__}: {error}") from error
        with torch.no_grad():
            for parameter in model.parameters():
                added = name.startswith("gemma")  # whose norms hold what is added to 1
                middle = 1.0 if parameter.dim() == 1 and not added else 0.0
                parameter.normal_(middle, case["weights"])
        if world.rank == 0:
            model.generation_config.eos_token_id = None
            model.save_pretrained(world.directory / "model")
    world.barrier()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return prepare_reference(model)


def options_of(case: Case, tp: int) -> dict[str, Any]:
    """Keyword arguments of a decoder, from the fields of :data:`LAYOUT`."""
    options: dict[str, Any] = {
        "sharding": Sharding(**case["sharding"]),
        "check_inputs": case["check_inputs"],
    }
    if case["split"]:
        options["tensor_split"] = case["split"][:tp]
    return options


def config_of(model: Any) -> ModelConfig:
    """colrow's configuration of a transformers model."""
    return config_from_hf(model.config.to_dict())


def whole_gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of a transformers model, under the names of its files."""
    return reference_grads(model, hf_naming(config_of(model)))


def whole_logits(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """transformers' logits in fp64; positions count from the first valid token."""
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if mask is not None:
        inputs["attention_mask"] = mask
        if model.config.model_type != "bloom":
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with precision(torch.float64):
        logits: Tensor = model(**inputs).logits
    return logits


def tokens(case: Case, rows: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids."""
    source = torch.Generator().manual_seed(1000 * case["seed"] + seed)
    return torch.randint(0, case["vocab"], (rows, length), generator=source)


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    """The loss as transformers and the papers define it, in plain torch."""
    flat, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    losses = F.cross_entropy(flat, wanted, reduction="none", label_smoothing=smoothing)
    counts = wanted != IGNORED
    losses = losses + z_loss * flat.logsumexp(-1).square() * counts
    if reduction == "none":
        return losses.view(labels.shape[0], -1)
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


def whole_loss(model: Any, ids: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """:func:`next_token_loss` of transformers' model."""
    return next_token_loss(whole_logits(model, ids, None), labels, **options)
