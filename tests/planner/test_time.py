from __future__ import annotations

from dataclasses import replace

import pytest

from colrow.planner import Layout, find_hardware, find_model, predict
from colrow.planner.catalog import shape_of_sizes
from colrow.planner.collective_time import collectives, tp_calls
from colrow.planner.links import Link, fit_latency_bandwidth, measured_link
from colrow.planner.model import ModelShape
from colrow.planner.pipeline_time import StageSeconds, bubble_seconds
from colrow.planner.roofline import matmul_seconds
from colrow.planner.time import straggler_share

STAGE = StageSeconds(forward=1.0, backward=2.0, weight_gradients=0.9)


@pytest.mark.parametrize(
    ("schedule", "chunks", "expected"),
    [
        ("gpipe", 1, 3 * 3.0),
        ("1f1b", 1, 3 * 3.0),
        ("interleaved", 2, 3 * 3.0 / 2),
        ("zb-h1", 1, 3 * (3.0 - 2 * 0.9)),
        ("zb-h2", 1, 3 * (3.0 - 3 * 0.9)),
    ],
)
def test_bubbles_are_those_of_the_papers(schedule: str, chunks: int, expected: float) -> None:
    layout = Layout(pp=4, global_batch=8, schedule=schedule, virtual_stages=chunks)  # type: ignore[arg-type]
    assert bubble_seconds(layout, [STAGE] * 4) == pytest.approx(expected)


def test_a_matmul_is_never_faster_than_the_roofline() -> None:
    device = find_hardware("a100").device
    for m, n, k in ((1, 4096, 4096), (128, 128, 128), (8192, 8192, 8192), (2049, 1000, 77)):
        seconds = matmul_seconds(device, m, n, k, precision="bf16", itemsize=2)
        assert seconds > 2 * m * n * k / (device.flops("bf16") * device.sustained_fraction)
        assert seconds > 2 * (m * k + n * k + m * n) / device.memory_bandwidth
    large = matmul_seconds(device, 8192, 8192, 8192, precision="bf16", itemsize=2)
    assert 2 * 8192**3 / large == pytest.approx(257e12, rel=0.08)  # what was measured


def test_rows_that_tensor_cores_cannot_load_are_multiplied_without_them() -> None:
    """150 numbers of 16 bits a head are no multiple of 16 bytes, 144 are."""
    device = find_hardware("a100").device
    fast, slow = (
        matmul_seconds(
            device, 2048, 2048, 144, precision="fp16", itemsize=2, count=12, aligned=aligned
        )
        for aligned in (True, False)
    )
    assert slow > 5 * fast
    layout = Layout(tp=8, recompute="full", precision="fp16", software="megatron-deepspeed")
    times = [
        predict(_gpt(96 * size), layout, "a100").time.attention / (96 * size)
        for size in (144, 150, 152)
    ]
    assert times[1] > 3 * times[0] and times[1] > 3 * times[2]


def _gpt(hidden: int) -> ModelShape:
    return shape_of_sizes(
        "gpt", "gpt2", hidden=hidden, layers=1, heads=96, vocab=1024, positions=2048, dropout=0.1
    )


def test_a_device_waits_for_the_host_that_launches() -> None:
    """A layer of hidden 1024 takes what launching it takes, however much it is divided."""
    model = shape_of_sizes(
        "gpt", "gpt2", hidden=1024, layers=12, heads=16, vocab=51200, positions=1024, dropout=0.1
    )
    base = Layout(
        global_batch=8, sequence=1024, recompute="full", precision="fp16", software="megatron-2021"
    )
    one, four = (predict(model, replace(base, tp=tp), "a100") for tp in (1, 4))
    assert four.time.matmul < 0.5 * one.time.matmul
    for p in (one, four):
        # vTrain's table: 3.4 to 3.9 ms a layer and microbatch.
        assert 3.3e-3 < p.step_seconds / (12 * 8) < 3.9e-3
    assert four.time.launches > one.time.launches > 0
    large = predict("gpt3-175b", replace(base, sequence=2048, tp=8), "a100")
    assert large.time.launches == 0


def test_a_single_row_over_a_wave_costs_a_wave() -> None:
    """108 tiles of 128 x 256 fill an A100; one row more needs another wave."""
    device = find_hardware("a100").device
    full = matmul_seconds(device, 128 * 108, 256, 4096, precision="bf16", itemsize=2)
    over = matmul_seconds(device, 128 * 108 + 1, 256, 4096, precision="bf16", itemsize=2)
    assert over > 1.3 * full


def test_collectives_are_the_ledgers() -> None:
    """One block's calls times the layers, and the ends, are all calls of a step."""
    model = find_model("gpt2")
    for sequence_parallel in (False, True):
        layout = Layout(tp=4, sequence=1024, sequence_parallel=sequence_parallel)
        parts = collectives(model, model.usual_block, layout)
        blocks = sum(call.bytes for call in parts.block) * model.config.num_layers
        ends = sum(call.bytes for call in parts.embedding + parts.head)
        calls = [c for c in tp_calls(model, layout) if c.layer not in ("inputs", "shared")]
        assert blocks + ends == sum(call.bytes for call in calls)


def test_recomputation_repeats_the_forward_collectives() -> None:
    model, layout = find_model("gpt2"), Layout(tp=4, sequence=1024)
    once, again = (
        collectives(model, model.usual_block, replace(layout, recompute=recompute)).block
        for recompute in ("none", "full")
    )
    assert len(once) == 4 and len(again) == 6


def test_a_fitted_link_gives_back_latency_and_bandwidth() -> None:
    sizes = [2.0**power for power in range(10, 30, 2)]
    link = Link(bandwidth=2e9, latency_seconds=3e-5)
    seconds = [link.collective_seconds("all_reduce", size, 4) for size in sizes]
    latency, bandwidth = fit_latency_bandwidth(sizes, seconds, "all_reduce", 4)
    assert latency == pytest.approx(3e-5) and bandwidth == pytest.approx(2e9)
    curve = measured_link([("all_reduce", 4, sizes, seconds)], "test")
    for size, expected in zip(sizes, seconds, strict=True):
        assert curve.collective_seconds("all_reduce", size, 4) == pytest.approx(expected)
    with pytest.raises(ValueError, match="different sizes"):
        fit_latency_bandwidth([8.0, 8.0], [1.0, 1.0], "all_reduce", 2)


def test_the_measured_nccl_curve_is_reproduced() -> None:
    """64 MiB: 684.6 us on 8 A100 (stas00/ml-engineering) and 579.9 (vTrain), 404.7 on 2 of them.

    Among up to 4 ranks H200 has the rings' speed and not the switch's, 363 of 473 GB/s.
    """
    link, size = find_hardware("a100").link, 2**26
    between = link.collective_seconds("all_reduce", size, 8)
    assert between**2 == pytest.approx(684.6e-6 * 579.9e-6, rel=0.01)
    assert link.collective_seconds("all_reduce", size, 2) == pytest.approx(404.7e-6, rel=0.01)
    switch = find_hardware("h200").link
    for ranks, speed in ((4, 363.3e9), (6, 435.6e9), (8, 473.1e9)):
        seconds = switch.collective_seconds("all_reduce", 2**33, ranks)
        assert 2 * (ranks - 1) / ranks * 2**33 / seconds == pytest.approx(speed, rel=0.03)


def test_activations_that_go_to_the_host_leave_memory_and_take_time() -> None:
    base = Layout(tp=1, dp=64, zero=3, global_batch=128, microbatch=2, sequence=8192)
    here, away = (
        predict("llama-3-70b", replace(base, offload_layers=layers), "gb200") for layers in (0, 40)
    )
    kept = here.memory.fullest.activations
    assert away.memory.fullest.activations == pytest.approx(kept * (40 + 2) / 80, rel=0.02)
    assert away.time.offload == 0  # hidden behind computing at 200 GB/s
    slow = predict("llama-3-70b", replace(base, offload_layers=80), "h100")
    assert 0 < slow.time.offload < slow.step_seconds
    with pytest.raises(ValueError, match="offload_layers=-1"):
        replace(base, offload_layers=-1)


def test_fused_attention_is_as_fast_as_the_programs_kernel() -> None:
    """4096 tokens on H100: 518 TFLOP/s in cuDNN, 319 in FlashAttention-2 (Shah et al. 2024)."""
    fast, slow = (
        predict("llama-3-8b", Layout(sequence=4096, software=name), "h100").time.attention
        for name in ("megatron-core", "nanotron")
    )
    # Of forward and backward: 1/518 + 2.5/424 over 1/319 + 2.5/270.
    assert fast / slow == pytest.approx(0.632, rel=0.02)


def test_parts_add_up_and_respond_as_they_should() -> None:
    base = Layout(tp=8, pp=4, dp=2, global_batch=64, sequence_parallel=True)
    p = predict("llama-3-70b", base, "h100")
    assert p.step_seconds == pytest.approx(sum(vars(p.time).values()))
    more = predict("llama-3-70b", replace(base, global_batch=128), "h100")
    assert more.time.pp_bubble == pytest.approx(p.time.pp_bubble)
    assert more.time.matmul == pytest.approx(2 * p.time.matmul)
    full = predict("llama-3-70b", replace(base, recompute="full"), "h100")
    assert full.time.recompute > 0 and full.time.tp_exposed > p.time.tp_exposed
    faster = predict("llama-3-70b", replace(base, software="megatron-core"), "h100")
    assert faster.time.tp_exposed < 0.6 * p.time.tp_exposed
    assert predict("gpt2", Layout(sequence=1024), "h100").time.tp_exposed == 0


def test_model_flops_are_those_of_korthikanti() -> None:
    """72 B L s h^2 (1 + s/6h + v/12hL), arXiv 2205.05198, eq. 7."""
    layout = Layout(global_batch=4, microbatch=4)
    found = predict("megatron-22b", layout, "a100").model_flops
    b, layers, s, h, v = 4, 48, 2048, 6144, 51200
    expected = 72 * b * layers * s * h**2 * (1 + s / (6 * h) + v / (12 * h * layers))
    assert found == pytest.approx(expected)


def test_more_devices_wait_longer_for_the_slowest() -> None:
    device = find_hardware("h100").device
    shares = [straggler_share(device, count) for count in (1, 8, 64, 1024)]
    assert shares[0] == 0 and shares == sorted(shares) and 0.02 < shares[-1] < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 0}, "tp=0"),
        ({"microbatch": -1}, "microbatch=-1"),
        ({"global_batch": 7, "dp": 2}, "not a multiple"),
        ({"schedule": "none"}, "must be one of"),
        ({"virtual_stages": 2}, "interleaved"),
        ({"precision": "fp4"}, "must be one of"),
        ({"software": "megatron"}, "did you mean"),
        ({"stage_layers": (1, 2)}, "for pp=1"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**options)  # type: ignore[arg-type]


def test_a_layout_that_does_not_suit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="12 query heads cannot be split over 16"):
        predict("gpt2", Layout(tp=16, sequence=1024), "a100")
    with pytest.raises(ValueError, match="12 layers, too few for 16 stages"):
        predict("gpt2", Layout(pp=16, sequence=1024), "a100")
    with pytest.raises(ValueError, match="1024 learned positions"):
        predict("gpt2", Layout(sequence=2048), "a100")
    with pytest.raises(ValueError, match="multiple of pp=4, got 6"):
        interleaved = Layout(
            pp=4, global_batch=6, schedule="interleaved", virtual_stages=3, sequence=1024
        )
        predict("gpt2", interleaved, "a100")
    with pytest.raises(ValueError, match="no bf16 matmul"):
        predict("gpt2", Layout(sequence=1024), "v100")
