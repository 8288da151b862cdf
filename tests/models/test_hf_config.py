"""Configurations as they are published, read as transformers reads them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from colrow.checkpoint.export_config import config_to_hf
from colrow.models.compose import fields_of
from colrow.models.hf_config import config_from_hf
from tests.models import tiny

PUBLISHED: dict[str, dict[str, Any]] = {
    "bloom-560m": {
        "model_type": "bloom",
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True,
        "n_embed": 1024,
        "n_inner": None,
        "n_layer": 24,
        "num_attention_heads": 16,
        "offset_alibi": 100,
        "pad_token_id": 3,
        "pretraining_tp": 1,
        "seq_length": 2048,
        "skip_bias_add": True,
        "vocab_size": 250880,
    },
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "vocab_size": 50257,
    },
    "gpt2 under common names": {
        "model_type": "gpt2",
        "hidden_size": 60,
        "num_attention_heads": 5,
        "num_hidden_layers": 3,
        "max_position_embeddings": 77,
        "bos_token_id": 95,
        "eos_token_id": 96,
        "vocab_size": 97,
    },
    "pythia-70m": {
        "model_type": "gpt_neox",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 512,
        "initializer_range": 0.02,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Qwen2-0.5B": {
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 131072,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "phi-4": {
        "model_type": "phi3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 100257,
        "embd_pdrop": 0.0,
        "eos_token_id": 100265,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 17920,
        "max_position_embeddings": 16384,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384,
        "pad_token_id": 100349,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 250000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    },
    "Phi-4-mini-instruct": {
        "model_type": "phi3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 199999,
        "embd_pdrop": 0.0,
        "eos_token_id": 199999,
        "full_attn_mod": 1,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1 + 0.9 * pair for pair in range(48)],
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "Phi-3-mini-128k": {
        "model_type": "phi3",
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "long_factor": [1 + 0.9 * pair for pair in range(48)],
            "short_factor": [1.05] * 48,
            "type": "longrope",
        },
        "rms_norm_eps": 1e-05,
        "sliding_window": 262144,
        "vocab_size": 32064,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "granite-3.1-2b": {
        "model_type": "granite",
        "attention_bias": False,
        "attention_dropout": 0.1,
        "attention_multiplier": 0.015625,
        "bos_token_id": 0,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49155,
    },
    "c4ai-command-r-v01": {
        "model_type": "cohere",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 5,
        "eos_token_id": 255001,
        "hidden_act": "silu",
        "hidden_size": 8192,
        "initializer_range": 0.02,
        "intermediate_size": 22528,
        "layer_norm_eps": 1e-05,
        "logit_scale": 0.0625,
        "max_position_embeddings": 8192,
        "model_max_length": 131072,
        "num_attention_heads": 64,
        "num_hidden_layers": 40,
        "num_key_value_heads": 64,
        "pad_token_id": 0,
        "rope_theta": 8000000.0,
        "use_qk_norm": False,
        "vocab_size": 256000,
    },
    "c4ai-command-r7b": {
        "model_type": "cohere2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 5,
        "eos_token_id": 255001,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "layer_norm_eps": 1e-05,
        "layer_switch": 4,
        "logit_scale": 0.25,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "order_of_interleaved_layers": "local_attn_first",
        "pad_token_id": 0,
        "position_embedding_type": "rope_gptj",
        "rope_scaling": None,
        "rope_theta": 50000,
        "rotary_pct": 1.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": True,
        "vocab_size": 256000,
    },
    "falcon-7b": {
        "model_type": "falcon",
        "alibi": False,
        "attention_dropout": 0.0,
        "bias": False,
        "bos_token_id": 11,
        "eos_token_id": 11,
        "hidden_dropout": 0.0,
        "hidden_size": 4544,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "falcon-40b": {
        "model_type": "falcon",
        "alibi": False,
        "attention_dropout": 0.0,
        "bias": False,
        "bos_token_id": 11,
        "eos_token_id": 11,
        "hidden_dropout": 0.0,
        "hidden_size": 8192,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "multi_query": True,
        "new_decoder_architecture": True,
        "num_attention_heads": 128,
        "num_hidden_layers": 60,
        "num_kv_heads": 8,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "starcoder2-3b": {
        "model_type": "starcoder2",
        "attention_dropout": 0.1,
        "bos_token_id": 0,
        "embedding_dropout": 0.1,
        "eos_token_id": 0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 3072,
        "initializer_range": 0.018042,
        "intermediate_size": 12288,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 16384,
        "mlp_type": "default",
        "norm_epsilon": 1e-05,
        "norm_type": "layer_norm",
        "num_attention_heads": 24,
        "num_hidden_layers": 30,
        "num_key_value_heads": 2,
        "residual_dropout": 0.1,
        "rope_theta": 999999.4420358813,
        "sliding_window": 4096,
        "use_bias": True,
        "vocab_size": 49152,
    },
    "GLM-4-9B-0414": {
        "model_type": "glm4",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 13696,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "pad_token_id": 151329,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 151552,
    },
    "SmolLM3-3B": {
        "model_type": "smollm3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128012,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pad_token_id": 128004,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_spellings_mean_what_transformers_reads(name: str) -> None:
    published = PUBLISHED[name]
    theirs = AutoConfig.for_model(**published).to_dict()
    assert config_from_hf(published) == config_from_hf(theirs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_left_out_mean_what_transformers_assumes(name: str) -> None:
    """Or the reader says which key it needs."""
    published = PUBLISHED[name]
    for key in published.keys() - {"model_type", "bos_token_id", "eos_token_id"}:
        rest = {other: value for other, value in published.items() if other != key}
        try:
            read = config_from_hf(rest)
        except ValueError as error:
            known = ("has no integer", "is not a multiple", "numbers: 64 are needed")
            assert any(text in str(error) for text in known)
            continue
        assert read == config_from_hf(AutoConfig.for_model(**rest).to_dict()), key


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Mistral-7B-v0.1", {"sliding_window": None}),
        ("Mistral-7B-v0.1", {"use_sliding_window": False}),
        ("Qwen2-0.5B", {"use_sliding_window": True, "max_window_layers": 5}),
        ("Qwen2-0.5B", {"use_sliding_window": True, "max_window_layers": 99}),
        ("Qwen3-0.6B", {"sliding_window": 7}),
        ("Llama-3.1-8B", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("Llama-3.1-8B", {"num_key_value_heads": None, "head_dim": None}),
        ("pythia-70m", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
        ("pythia-70m", {"rope_theta": 10000, "partial_rotary_factor": 0.25}),
        ("Llama-3.1-8B", {"rotary_emb_base": 40.0, "rotary_pct": 0.5}),
        ("Llama-3.1-8B", {"original_max_position_embeddings": 4096}),
        (
            "Qwen3-0.6B",
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000000},
            },
        ),
    ],
)
def test_settings_mean_what_transformers_reads(name: str, change: dict[str, Any]) -> None:
    values = {**PUBLISHED[name], **change}
    assert config_from_hf(values) == config_from_hf(AutoConfig.for_model(**values).to_dict())


@pytest.mark.parametrize(
    ("name", "change", "windows"),
    [
        ("Mistral-7B-v0.1", {"sliding_window": None}, ()),
        ("Mistral-7B-v0.1", {"sliding_window": 9}, (9,) * 32),
        # With layer_types transformers makes it a Ministral, whose layers differ.
        (
            "Mistral-7B-v0.1",
            {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 16},
            (9, None) * 16,
        ),
        ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, ()),
        ("Qwen2-0.5B", {}, ()),
        ("Qwen2-0.5B", {"use_sliding_window": True, "max_window_layers": 24}, ()),
        (
            "Qwen2-0.5B",
            {"use_sliding_window": True, "max_window_layers": 5},
            (None,) * 5 + (131072,) * 19,
        ),
    ],
)
def test_sliding_windows(
    name: str, change: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    config = config_from_hf({**PUBLISHED[name], **change})
    assert fields_of(config)["windows"] == windows
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_scaling": 8.0}, r"llama with logits_scaling=8\.0 is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"sliding_window": 4096}, "llama with sliding_window=4096"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"intermediate_size": None}, "no integer 'intermediate_size'"),
        ({"is_causal": False}, "is_causal=False"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "mean different rotary positions"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types asks for sliding_attention"),
        ({"layer_types": ["chunked_attention"] * 32}, r"layer_types \['chunked_attention'\]"),
        ({"layer_types": ["full_attention"] * 2}, "names 2 layers, and there are 32"),
    ],
)
def test_llama_with_what_it_does_not_know(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_hf({**PUBLISHED["Llama-3.1-8B"], **change})
    neutral = {"logits_scaling": 1.0, "clip_qkv": None, "alibi": False, "sliding_window": None}
    published = PUBLISHED["Llama-3.1-8B"]
    assert config_from_hf({**published, **neutral}) == config_from_hf(published)


def test_what_changes_numbers_and_is_not_understood_is_refused() -> None:
    gpt2 = PUBLISHED["gpt2"]
    with pytest.raises(ValueError, match="hidden_size=60 and n_embd=768 mean the same"):
        config_from_hf({**gpt2, "hidden_size": 60})
    with pytest.raises(ValueError, match="quantised"):
        config_from_hf({**gpt2, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx=True"):
        config_from_hf({**gpt2, "scale_attn_by_inverse_layer_idx": True})
    pythia = PUBLISHED["pythia-70m"]
    for change in ({"rope_theta": 5.0}, {"partial_rotary_factor": 0.5}):
        with pytest.raises(ValueError, match="contradicts what transformers takes for a gpt_neox"):
            config_from_hf({**pythia, **change})
    bloom = PUBLISHED["bloom-560m"]
    with pytest.raises(ValueError, match="apply_residual_connection_post_layernorm=True"):
        config_from_hf({**bloom, "apply_residual_connection_post_layernorm": True})
    qwen = {**PUBLISHED["Qwen2-0.5B"], "use_sliding_window": True}
    with pytest.raises(ValueError, match="chunked_attention"):
        config_from_hf({**qwen, "layer_types": ["chunked_attention"] * 24})
    llama = PUBLISHED["Llama-3.1-8B"]
    with pytest.raises(ValueError, match="rope type 'proportional'"):
        config_from_hf({**llama, "rope_scaling": {"rope_type": "proportional", "factor": 4.0}})


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("gemma3", {"sliding_window": None}, "sliding_window=null"),
        ("gemma3", {"rope_parameters": {"rope_theta": 5.0}}, "has a table for full_attention"),
        ("gemma3", {"sliding_window_pattern": 2.5}, "sliding_window_pattern"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "must be above 0"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        (
            "phi3",
            {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]},
            "transformers gives every layer the window",
        ),
    ],
)
def test_what_a_family_cannot_mean_is_refused(
    case: str, change: dict[str, Any], message: str
) -> None:
    kind, keys = tiny.CASES[case]
    values = {"model_type": kind, "max_position_embeddings": 64, **keys}
    config_from_hf(values)
    with pytest.raises(ValueError, match=message):
        config_from_hf({**values, **change})
