"""Experts, latent attention and parts of sequences in plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, Glm4MoeConfig, GptOssConfig

from colrow.planner import Layout, find_hardware, find_model, predict
from colrow.planner.collective_time import ep_seconds
from colrow.planner.config_json import model_from_mapping
from colrow.planner.recommend import recommend

B200 = find_hardware("b200")


def test_dividing_experts_divides_their_memory_and_sends_tokens() -> None:
    model = find_model("qwen3-30b-a3b")
    base = Layout(dp=8, global_batch=64, sequence=4096, zero=1)
    whole, divided = (predict(model, replace(base, ep=ep), B200) for ep in (1, 8))
    experts = 48 * 128 * 3 * 2048 * 768
    saved = whole.memory.fullest.weights - divided.memory.fullest.weights
    assert saved == pytest.approx(experts * 7 / 8 * 2)
    # ZeRO-1 divides the optimiser over replicas: experts have one replica with ep = dp.
    assert divided.memory.fullest.optimizer == pytest.approx(
        whole.memory.fullest.optimizer, rel=1e-6
    )
    assert whole.time.ep_exposed == 0 < divided.time.ep_exposed


def test_tokens_travel_to_experts_and_back() -> None:
    """Four times a step and layer, each time 7/8 of tokens x active experts x hidden."""
    model = find_model("qwen3-30b-a3b")
    layout = Layout(dp=8, ep=8, global_batch=8, sequence=4096)
    block = model.usual_block
    seconds = sum(ep_seconds(block, layout, B200, phase).total for phase in ("forward", "backward"))
    sent = 4 * 7 / 8 * 4096 * 8 * 2048 * 2
    assert sent / seconds < B200.link.bandwidth
    assert sent / seconds > 0.5 * B200.link.bandwidth


def test_a_part_of_a_sequence_takes_a_part_of_the_time_and_memory() -> None:
    model = find_model("llama-3-8b")
    base = Layout(global_batch=1, sequence=65536, zero=0)
    one, eight = (predict(model, replace(base, cp=cp), B200) for cp in (1, 8))
    assert eight.layout.devices == 8
    assert eight.time.matmul == pytest.approx(one.time.matmul / 8, rel=0.05)
    assert eight.time.attention == pytest.approx(one.time.attention / 8, rel=0.02)
    ratio = eight.memory.fullest.activations / one.memory.fullest.activations
    assert ratio == pytest.approx(1 / 8, rel=0.05)
    assert eight.time.cp_exposed > 0 and eight.time.dp_exposed > 0
    assert eight.memory.fullest.weights == one.memory.fullest.weights


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(dp=4, ep=3, sequence=128), "ep=3 does not divide the 8 experts"),
        (Layout(dp=3, ep=2, sequence=128), r"ep=2 must divide dp x cp = 3"),
    ],
)
def test_experts_that_cannot_be_divided_are_refused(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict("mixtral-8x7b", layout, B200)
    with pytest.raises(ValueError, match="has no experts"):
        predict("gpt2", Layout(dp=2, ep=2, sequence=128), B200)


def test_a_search_divides_experts() -> None:
    base = Layout(global_batch=64, sequence=4096, software="megatron-core-default")
    found = recommend(find_model("qwen3-30b-a3b"), B200, 8, base, keep=200)
    assert {p.layout.ep for p in found.fitting} >= {1, 2, 4, 8}
    assert found.best[0].layout.ep > 1


TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    "config",
    [
        DeepseekV3Config(
            **TINY,
            num_key_value_heads=4,
            intermediate_size=80,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=12,
        ),
        Glm4MoeConfig(
            **TINY,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=80,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
            attention_bias=True,
        ),
        GptOssConfig(
            **TINY,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=32,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_parameters_are_those_of_transformers_models(config: object) -> None:
    """All of them; of what is put together from keys, the vectors may differ."""
    mapping = config.to_dict()  # type: ignore[attr-defined]
    found = model_from_mapping(mapping, name="tiny")
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in reference.parameters())
    vectors = sum(p.numel() for p in reference.parameters() if p.dim() == 1)
    put_together = mapping["model_type"] == "glm4_moe"
    assert 0 <= total - found.parameters <= (vectors if put_together else 0)
