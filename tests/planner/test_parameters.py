"""Parameter counts against transformers' own modules, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.planner.published import read_table
from colrow.layers.describe import AttentionSpec, ExpertsSpec
from colrow.models.compose import fields_of
from colrow.planner import ModelShape, catalog, find_model
from colrow.planner.model import held


def hf_parameters(model: ModelShape, layers: int) -> int:
    """Parameters of transformers' model of this shape with so many layers."""
    c = fields_of(model.config)
    shared: dict[str, Any] = {
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": c["num_heads"],
        "tie_word_embeddings": c["tie_embeddings"],
    }
    family = c["family"]
    if family in ("gpt2", "bloom"):
        shared |= {"n_layer": layers, "n_head": c["num_heads"], "n_embd": c["hidden_size"]}
        shared |= {"n_inner": c["ffn_size"], "n_positions": c["max_positions"]}
    else:
        shared |= {
            "intermediate_size": c["ffn_size"],
            "max_position_embeddings": c["max_positions"],
            "num_key_value_heads": c["num_kv_heads"],
            "head_dim": c["head_dim"],
        }
    if c["experts"]:
        family = {"mistral": "mixtral", "qwen3": "qwen3_moe"}[family]
        shared |= {
            "num_local_experts": c["experts"],
            "num_experts": c["experts"],
            "moe_intermediate_size": c["ffn_size"],
            "num_experts_per_tok": c["active_experts"],
        }
    with torch.device("meta"):
        found = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shared))
    return sum(p.numel() for p in found.parameters())


# Models put together from parts are compared, in tiny, in test_experts.
SIMPLE = [
    name
    for name, model in sorted(catalog().items())
    if isinstance(model.usual_block.attention, AttentionSpec)
    and len(model.usual_block.mlp.passes) == 1
    and not name.startswith("gpt-oss")
]


@pytest.mark.parametrize("name", SIMPLE)
def test_counts_are_those_of_transformers(name: str) -> None:
    """Layers are alike, so one and two of them tell the count of all."""
    model = find_model(name)
    one, two = hf_parameters(model, 1), hf_parameters(model, 2)
    assert model.parameters == one + (model.config.num_layers - 1) * (two - one)


# As the published checkpoints' files add up to.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gpt-neox-20b": 20_554_567_680,
    "bloom-560m": 559_214_592,
    "bloom-176b": 176_247_271_424,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_the_published_checkpoints(name: str) -> None:
    assert find_model(name).parameters == PUBLISHED[name]


def test_counts_are_those_that_megatrons_papers_print() -> None:
    for row in read_table("narayanan2021_table1"):
        name = f"megatron-{float(row['params_B']):g}b"
        name = {"megatron-529.6b": "megatron-530b", "megatron-1008b": "megatron-1t"}.get(name, name)
        assert find_model(name).parameters / 1e9 == pytest.approx(float(row["params_B"]), abs=0.05)


@pytest.mark.parametrize(
    ("name", "active"),
    [("mixtral-8x7b", 12_879_925_248), ("qwen3-30b-a3b", 3_353_032_704)],
)
def test_active_parameters_are_those_of_the_chosen_experts(name: str, active: int) -> None:
    model = find_model(name)
    config, mlp = model.config, model.usual_block.mlp
    assert isinstance(mlp, ExpertsSpec)
    per_expert = 3 * config.hidden_size * mlp.expert.ffn_size
    idle = (mlp.count - mlp.active) * per_expert
    assert model.active_parameters == active
    assert model.parameters - active == config.num_layers * idle


@pytest.mark.parametrize("tp", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["llama-3-8b", "gpt2", "bloom-560m"])
def test_shards_cover_the_model(name: str, tp: int) -> None:
    """What ranks hold adds up to the model, replicated parameters counted on every rank."""
    model = find_model(name)
    division, layers = model.division(tp), model.config.num_layers
    found = sum(
        ends.embedding + layers * held(model.usual_block, division, rank).dense + ends.head
        for rank in range(tp)
        for ends in (model.ends(division, rank),)
    )
    assert found >= model.parameters
    if tp == 1:
        assert found == model.parameters


def test_names_are_forgiving_and_suggest_near_matches() -> None:
    assert find_model("meta-llama/Meta-Llama-3-70B-Instruct").name == "llama-3-70b"
    assert find_model("GPT3").name == "gpt3-175b"
    with pytest.raises(ValueError, match="did you mean llama-3-70b"):
        find_model("lama-3-70b")
    with pytest.raises(ValueError, match=r"describe others"):
        find_model("zzzz")


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("deepseek-v2", 236, 21),
        ("deepseek-v3", 671, 37),
        ("kimi-k2", 1026, 32.4),
        ("qwen3-235b-a22b", 235, 22),
        ("qwen3-coder-480b-a35b", 480, 35),
        ("gpt-oss-20b", 20.9, 3.6),
        ("gpt-oss-120b", 116.8, 5.1),
        ("glm-4.5", 355, 32),
        ("glm-4.5-air", 106, 12),
    ],
)
def test_mixtures_have_the_parameters_that_their_reports_print(
    name: str, billions: float, active: float
) -> None:
    model = find_model(name)
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.012)
    # Reports differ in whether they count the embedding among a token's parameters.
    embedding = model.config.vocab_size * model.config.hidden_size / 1e9
    assert active - embedding - 1 < model.active_parameters / 1e9 < active + 2 * embedding + 1
