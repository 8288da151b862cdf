from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from colrow.comm.ledger import summarize
from colrow.layers.describe import Division
from colrow.planner import Layout, ModelShape, find_hardware, find_model, predict
from colrow.planner.activations import block_bytes
from colrow.planner.catalog import shape_of_sizes
from colrow.planner.collective_time import tp_calls
from colrow.planner.machine_file import machine_from_mapping
from colrow.planner.memory import RankMemory, training_memory
from colrow.planner.model import held
from tests.planner.measure import measured
from tests.ranks import RankPool

CPU = machine_from_mapping(
    {
        "devices_per_node": 4,
        "device": {
            "memory_gigabytes": 8,
            "memory_gigabytes_per_second": 10,
            "peak_teraflops": {"fp32": 0.05, "bf16": 0.01},
        },
    },
    default_name="cpu",
)
LLAMA = shape_of_sizes(
    "l", "llama", hidden=128, heads=8, kv_heads=2, ffn=352, layers=8, vocab=512, positions=128
)
GPT = shape_of_sizes("g", "gpt2", hidden=128, heads=8, layers=8, vocab=512, dropout=0.0)
QWEN = shape_of_sizes("q", "qwen3", hidden=128, heads=8, kv_heads=4, ffn=352, layers=2, vocab=512)
NEOX = shape_of_sizes("n", "gpt_neox", hidden=128, heads=8, layers=2, vocab=512)
BLOOM = shape_of_sizes("b", "bloom", hidden=128, heads=8, layers=4, vocab=512)
DROPPING = shape_of_sizes("d", "gpt2", hidden=128, heads=8, layers=8, vocab=512, dropout=0.1)


def runs(tp: Any, cases: list[tuple[ModelShape, Layout]]) -> list[dict[str, Any]]:
    """Each case; where something is sent three steps, since late releases only add to a peak."""
    return [measured(tp, shape, layout, 3 if tp.size > 1 else 1) for shape, layout in cases]


def in_use(memory: RankMemory) -> float:
    return memory.activations + memory.transient + memory.communication


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_a_real_step_takes_what_is_predicted(ranks: RankPool, tp: int) -> None:
    """Weights, gradients, states and sent bytes exactly; activations within 5 %."""
    cases = []
    alone = (LLAMA, GPT, QWEN, NEOX, BLOOM, DROPPING)
    for shape in alone if tp == 1 else (LLAMA, GPT):
        for sequence_parallel in (False, True)[: min(tp, 2)]:
            for precision in ("fp32", "bf16"):
                layout = Layout(
                    tp=tp,
                    microbatch=2,
                    sequence=120,
                    sequence_parallel=sequence_parallel,
                    precision=precision,
                    master_weights=False,
                )
                cases.append((shape, layout))
    by_rank = ranks(tp, runs, cases, timeout=240)
    for index, (shape, layout) in enumerate(cases):
        predicted = training_memory(shape, layout, CPU).ranks[0]
        for rank in range(tp):
            found, memory = by_rank[rank][index], predicted[rank]
            where = f"{shape.config.family} {layout.describe()} {layout.precision} rank {rank}"
            for part in ("weights", "gradients", "optimizer"):
                assert found[part] == getattr(memory, part), f"{where}: {part}"
            assert found["calls"] == summarize(tp_calls(shape, layout)), where
            assert in_use(memory) == pytest.approx(found["peak"], rel=0.05), where


def test_four_ranks_send_what_is_predicted(ranks: RankPool) -> None:
    layout = Layout(tp=4, microbatch=2, sequence=30, precision="fp32", sequence_parallel=True)
    for found in ranks(4, measured, LLAMA, layout):
        assert found["calls"] == summarize(tp_calls(LLAMA, layout))


@pytest.mark.parametrize(
    ("options", "constant", "divided", "scores"),
    [
        ({"tp": 1}, 34, 0, 5.0),
        ({"tp": 8}, 10, 24, 5.0),
        ({"tp": 8, "sequence_parallel": True}, 0, 34, 5.0),
        ({"tp": 8, "recompute": "selective"}, 10, 24, 0.0),
        ({"tp": 8, "sequence_parallel": True, "recompute": "selective"}, 0, 34, 0.0),
    ],
)
def test_activations_are_those_of_korthikanti(
    options: dict[str, Any], constant: int, divided: int, scores: float
) -> None:
    """s b h (c + d/t + 5 a s / (h t)), arXiv 2205.05198, Table 2."""
    model = find_model("megatron-22b")
    layout = Layout(microbatch=4, sequence=2048, software="megatron-2022", **options)
    s, b, h, a, t = 2048, 4, 6144, 64, layout.tp
    found = sum(block_bytes(model.usual_block, layout, 0, flash=False).values())
    assert found == pytest.approx(s * b * h * (constant + divided / t + scores * a * s / (h * t)))


def test_mixed_precision_adam_takes_18_bytes_per_parameter() -> None:
    memory = predict("llama-2-7b", Layout(), "a100").memory.fullest
    parameters = find_model("llama-2-7b").parameters
    assert memory.model_states == pytest.approx(18 * parameters, rel=1e-6)


@pytest.mark.parametrize(
    ("zero", "expected"), [(0, 18), (1, 6 + 12 / 8), (2, 2 + 16 / 8), (3, 18 / 8)]
)
def test_zero_divides_states_gradients_then_weights(zero: int, expected: float) -> None:
    """Rajbhandari et al. 2020, figure 1, with fp32 gradients."""
    layout = Layout(dp=8, zero=zero, global_batch=8)
    memory = predict("llama-2-7b", layout, "a100").memory.fullest
    states = expected * find_model("llama-2-7b").parameters
    assert memory.model_states == pytest.approx(states, rel=1e-6)


def test_schedules_keep_what_their_papers_say() -> None:
    """First stage, in microbatches' worth of the whole model (Korthikanti et al. 2022, 4.2.3)."""
    model, hardware = find_model("megatron-175b"), find_hardware("a100")
    base = Layout(tp=8, pp=8, global_batch=64, software="megatron-2022", recompute="selective")
    block = block_bytes(model.usual_block, base, 0, flash=False)
    whole = 96 * sum(block.values())

    def first(layout: Layout) -> float:
        return training_memory(model, layout, hardware).ranks[0][0].activations / whole

    assert first(base) == pytest.approx(1, rel=0.01)
    interleaved = replace(base, schedule="interleaved", virtual_stages=3)
    assert first(interleaved) == pytest.approx(1 + 7 / (8 * 3), rel=0.01)
    assert first(replace(base, schedule="gpipe")) == pytest.approx(64 / 8, rel=0.01)


def test_uneven_layers_and_shares_are_counted_per_rank() -> None:
    model = find_model("llama-2-7b")
    layout = Layout(pp=2, stage_layers=(20, 12), global_batch=2)
    first, last = predict(model, layout, "a100").memory.ranks
    per_block = held(model.usual_block, Division(1), 0).dense
    assert first[0].weights - last[0].weights == 2 * (8 * per_block - 4096)  # the final norm
    uneven = predict(model, Layout(tp=2, tp_weights=(0.75, 0.25)), "a100").memory.ranks[0]
    assert uneven[0].weights > 2.9 * uneven[1].weights
    with pytest.raises(ValueError, match="add up to 31"):
        predict(model, Layout(pp=2, stage_layers=(20, 11), global_batch=2), "a100")


def test_full_recomputation_keeps_a_block_and_the_inputs_of_all() -> None:
    model = find_model("llama-2-7b")
    full = predict(model, Layout(recompute="full"), "a100").memory.fullest
    none = predict(model, Layout(), "a100").memory.fullest
    inputs = 32 * 2048 * 4096 * 2
    assert inputs < full.activations < 1.2 * inputs
    assert none.activations > 10 * full.activations
    assert full.transient >= none.transient
