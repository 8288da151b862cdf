"""Adapters, frozen weights and 8-bit matmuls in plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

from colrow.planner import Layout, find_hardware, predict
from colrow.planner.catalog import find_model
from colrow.planner.inference import kv_cache_bytes_per_token
from colrow.planner.serving import WEIGHT_BYTES
from colrow.planner.stage_elements import lora_elements

BASE = Layout(global_batch=1, sequence=2048)
H100 = find_hardware("h100")


def test_adapters_are_those_of_peft() -> None:
    """Llama-3-8B, r=16 on all linear layers: 41,943,040 trainable parameters."""
    layout = replace(BASE, lora_rank=16)
    assert 32 * lora_elements(find_model("llama-3-8b").usual_block, layout, 0) == 41_943_040
    memory = predict("llama-3-8b", layout, H100).memory.fullest
    assert memory.gradients == 4 * 41_943_040
    assert memory.weights == 2 * (8_030_261_248 + 41_943_040)


def test_frozen_weights_take_what_their_format_takes() -> None:
    """NF4 with double quantisation: 4.127 bits a weight; embedding and head stay in 16 bits."""
    assert 8 * WEIGHT_BYTES["nf4"] == pytest.approx(4.127, abs=0.02)
    layout = replace(BASE, lora_rank=16, frozen="nf4")
    memory = predict("llama-3-8b", layout, H100).memory.fullest
    assert memory.weights / 1e9 == pytest.approx(5.8, abs=0.1)


def test_what_is_frozen_has_no_weight_gradient() -> None:
    full, adapters = (
        predict("llama-3-8b", replace(BASE, lora_rank=rank, sequence=4096), H100)
        for rank in (0, 16)
    )
    blocks = 0.75  # of the matmuls without a third of backward's; the head keeps its own
    assert blocks * 0.85 < adapters.time.matmul / full.time.matmul < blocks * 1.15
    assert adapters.time.optimizer < 0.05 * full.time.optimizer
    with pytest.raises(ValueError, match="needs a lora_rank"):
        Layout(frozen="nf4")
    with pytest.raises(ValueError, match="must be one of"):
        Layout(lora_rank=4, frozen="int3")


def test_8_bit_matmuls_are_faster_and_pay_for_narrowing() -> None:
    wide, narrow = (
        predict("llama-3-70b", replace(BASE, tp=8, precision=precision), H100)
        for precision in ("bf16", "fp8")
    )
    assert 1.5 < wide.time.matmul / narrow.time.matmul < 2
    assert narrow.time.elementwise > wide.time.elementwise
    # A byte less for every number of both blocks' inputs and of the MLP's inner one.
    saved = wide.memory.fullest.activations - narrow.memory.fullest.activations
    assert saved == 80 * 2048 * (2 * 8192 + 28672 // 8)


def test_latent_attention_keeps_little_of_a_token() -> None:
    """DeepSeek-V3: 70.3 KB per token in 16 bits (DeepSeek-AI 2025, arXiv 2505.09343, Table 1)."""
    assert kv_cache_bytes_per_token(find_model("deepseek-v3")) == 70_272
