"""Models whose blocks differ from each other, or from the usual: what is planned for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Olmo2Config

from colrow.comm.ledger import summarize
from colrow.layers.describe import BlockSpec
from colrow.layers.options import RopeConfig
from colrow.models.compose import decoder, fields_of
from colrow.models.stages import LayerSplit
from colrow.planner import Layout, ModelShape, find_hardware, find_model, predict, predict_serving
from colrow.planner.block_time import block_time
from colrow.planner.collective_time import collectives, tp_calls
from colrow.planner.memory import training_memory
from colrow.planner.serving import Serving
from tests.planner.measure import measured
from tests.planner.test_memory import CPU, in_use
from tests.ranks import RankPool

H100 = find_hardware("h100")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_layers": 6,
    "num_heads": 4,
    "head_dim": 16,
    "ffn_size": 80,
    "max_positions": 4096,
    "rope": RopeConfig(theta=1e6, dims=16),
}
HF_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 16,
    "intermediate_size": 80,
    "pad_token_id": 0,
}
GEMMA_3 = ModelShape(
    "gemma-3",
    decoder(
        family="gemma3_text",
        num_kv_heads=2,
        norms="around",
        norm_centred=True,
        norm_wide=True,
        activation="gelu_tanh",
        qk_norm="each_head",
        window_rope=RopeConfig(theta=1e4, dims=16),
        windows=(64, 64, None, 64, 64, None),
        embedding_scale=8.0,
        tie_embeddings=True,
        **SIZES,
    ),
)
OLMO_2 = ModelShape(
    "olmo-2",
    decoder(
        family="olmo2",
        num_kv_heads=4,
        norms="after",
        norm_wide=True,
        qk_norm="all_heads",
        **SIZES,
    ),
)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (GEMMA_3, Gemma3TextConfig(**HF_SIZES, num_key_value_heads=2)),
        (OLMO_2, Olmo2Config(**HF_SIZES, num_key_value_heads=4)),
    ],
    ids=lambda value: value.name if isinstance(value, ModelShape) else "",
)
def test_parameters_are_those_of_transformers(model: ModelShape, config: object) -> None:
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(config)
    assert model.parameters == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("layout", [Layout(tp=3), Layout(tp=2, pp=3), Layout(tp=1, pp=2)])
@pytest.mark.parametrize("name", ["gemma-3", "olmo-2", "deepseek-v3", "glm-4.5-air"])
def test_ranks_hold_what_is_described(name: str, layout: Layout) -> None:
    """Weights of every rank are the shards of the configuration's parameters."""
    given = {"gemma-3": GEMMA_3, "olmo-2": OLMO_2}
    model = given[name] if name in given else find_model(name)
    split = LayerSplit(layout.layers_of_stage(model), layout.pp)
    parameters = model.config.parameters(layout.division)
    for stage, ranks in enumerate(training_memory(model, layout, H100).ranks):
        held = split.held(parameters, stage, tied=model.config.tie_embeddings)
        for rank, memory in enumerate(ranks):
            elements = sum(math.prod(p.shard.local_shape(rank)) for p in held.values())
            assert memory.weights == 2 * elements, f"stage {stage}, rank {rank}"


def steps(tp: Any, cases: list[tuple[ModelShape, Layout]]) -> list[dict[str, Any]]:
    return [measured(tp, model, layout, 3 if tp.size > 1 else 1) for model, layout in cases]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_real_step_takes_what_is_predicted(ranks: RankPool, tp: int) -> None:
    """Weights, gradients, states and sent bytes exactly; activations within 5 %."""
    larger = {"hidden_size": 128, "num_heads": 8, "ffn_size": 352, "vocab_size": 512}
    cases = [
        (
            ModelShape(model.name, decoder(**{**fields_of(model.config), **larger})),
            Layout(
                tp=tp,
                microbatch=2,
                sequence=120,
                sequence_parallel=tp > 1,
                precision=precision,
                master_weights=False,
            ),
        )
        for model in (GEMMA_3, OLMO_2)
        for precision in ("fp32", "bf16")
    ]
    for rank, results in enumerate(ranks(tp, steps, cases, timeout=240)):
        for (model, layout), found in zip(cases, results, strict=True):
            memory = training_memory(model, layout, CPU).ranks[0][rank]
            where = f"{model.name} {layout.precision} rank {rank}"
            for part in ("weights", "gradients", "optimizer"):
                assert found[part] == getattr(memory, part), f"{where}: {part}"
            assert found["calls"] == summarize(tp_calls(model, layout)), where
            assert in_use(memory) == pytest.approx(found["peak"], rel=0.05), where


def test_stages_hold_consecutive_blocks_and_chunks_go_round() -> None:
    dense_first = find_model("deepseek-v3")
    first, *others = Layout(pp=4).kinds_of_stages(dense_first)
    assert sorted(first.values()) == [3, 12] and all(len(kinds) == 1 for kinds in others)
    # Layers are 64, 64, None, 64, 64, None: two in a row on each of three stages, or one and one.
    for layout, expected in (
        (Layout(pp=3), [{64: 2}, {None: 1, 64: 1}, {64: 1, None: 1}]),
        (
            Layout(pp=3, schedule="interleaved", virtual_stages=2),
            [{64: 2}, {64: 2}, {None: 2}],
        ),
    ):
        assert [
            {block.attention.window: count for block, count in kinds.items()}
            for kinds in layout.kinds_of_stages(GEMMA_3)
        ] == expected


def test_short_windows_save_scores_time_and_reading_of_the_cache() -> None:
    """Of six layers four have a window: the mean of the two kinds counts."""
    local, whole = (
        ModelShape("", replace(GEMMA_3.config, blocks=(block,) * 6))
        for block in (GEMMA_3.config.blocks[0], GEMMA_3.config.blocks[2])
    )
    layout = Layout(sequence=2048, global_batch=1, attention="unfused")
    for value in (
        lambda m: predict(m, layout, H100).time.attention,
        lambda m: predict(m, layout, H100).model_flops,
        lambda m: training_memory(m, layout, H100).fullest.activations,
        lambda m: predict_serving(m, Serving(prompt=2048), H100).token.attention,
        lambda m: predict_serving(m, Serving(prompt=2048), H100).prefill_seconds,
    ):
        mixed, most, least = value(GEMMA_3), value(whole), value(local)
        assert mixed == pytest.approx((2 * most + 4 * least) / 6) and least < most


def test_norms_over_all_heads_send_their_squares() -> None:
    """Two numbers of 4 bytes a token in either direction; OLMo 2 has two norms, Gemma 3 four."""
    layout = Layout(tp=2, sequence=128)
    calls = collectives(OLMO_2, OLMO_2.usual_block, layout).block
    squares = [call.bytes for call in calls if call.layer.endswith("norms")]
    assert squares == [2 * 4 * 128] * 2
    sent = {
        model.name: block_time(model, model.usual_block, layout, H100)
        for model in (OLMO_2, GEMMA_3)
    }
    assert sent["olmo-2"].tp_forward.total > sent["gemma-3"].tp_forward.total
    assert sent["olmo-2"].passes.forward.elementwise < sent["gemma-3"].passes.forward.elementwise


@dataclass(frozen=True)
class StateSpace:
    """What no planner knows."""

    hidden_size: int = 64
    num_heads: int = 4
    window: int | None = None
    dropout: float = 0.0


@pytest.mark.parametrize("place", ["attention", "mlp"])
def test_unknown_compositions_are_refused(place: str) -> None:
    config = GEMMA_3.config
    foreign: BlockSpec = replace(config.blocks[0], **{place: StateSpace()})  # type: ignore[arg-type]
    config = replace(config, blocks=(*config.blocks, foreign))
    with pytest.raises(ValueError, match="StateSpace is a kind of layer that the planner cannot"):
        predict(config, Layout(sequence=128), H100)
    with pytest.raises(ValueError, match="StateSpace is a kind of layer that the planner cannot"):
        predict_serving(config, Serving(prompt=128), H100)
