"""The examples that everybody knows come out right, with the reason."""

from __future__ import annotations

import pytest

from colrow.planner import (
    Layout,
    Serving,
    find_hardware,
    find_model,
    predict,
    predict_serving,
    recommend,
)
from colrow.planner.inference import kv_cache_bytes_per_token
from colrow.planner.reasons import what_loses, why_first
from colrow.planner.recommend import layouts, smallest_change
from colrow.planner.serving_search import recommend_serving
from colrow.planner.unequal import split_unequal

A100, H100 = find_hardware("a100-80gb"), find_hardware("h100-80gb")


def test_175b_needs_model_parallelism() -> None:
    """350 GB of fp16 parameters; 43.75 GB a rank at tp=8 (and the positions on every rank)."""
    model = find_model("gpt3-175b")
    assert 2 * model.parameters == pytest.approx(350e9, rel=0.003)
    chosen, notes = recommend_serving(model, A100, None, Serving(weights="fp16", prompt=512))
    assert (chosen.serving.tp, chosen.serving.pp) == (8, 1)
    assert chosen.fullest.weights == pytest.approx(43.75e9, rel=0.003)
    assert "349 GB" in notes[0]
    assert not predict_serving(model, Serving(tp=4, weights="fp16", prompt=512), A100).fits


def test_70b_in_16_bit_runs_on_eight_a100() -> None:
    assert predict_serving("llama-2-70b", Serving(tp=8, weights="fp16"), A100).fits
    assert not predict_serving("llama-2-70b", Serving(weights="fp16"), A100).fits
    chosen, notes = recommend_serving(find_model("llama-2-70b"), A100, 8, Serving(weights="fp16"))
    assert chosen.fits and any("With int" in note for note in notes)


def test_7b_runs_on_one_gpu_and_is_not_cut() -> None:
    chosen, notes = recommend_serving(find_model("llama-2-7b"), A100, None, Serving())
    assert chosen.serving.devices == 1 and "fits on one" in notes[0]


def test_small_models_are_replicated_not_cut() -> None:
    model = find_model("gpt2")
    best = recommend(model, A100, 8, Layout(global_batch=64, sequence=1024)).best[0]
    assert (best.layout.tp, best.layout.pp, best.layout.dp) == (1, 1, 8)
    assert "fits on one A100" in why_first(best)


def test_175b_trains_on_384_gpus_as_tp8_pp12_dp4() -> None:
    layout = Layout(
        tp=8,
        pp=12,
        dp=4,
        global_batch=1536,
        recompute="full",
        precision="fp16",
        software="megatron-2021",
    )
    p = predict("gpt3-175b", layout, A100)
    assert p.layout.devices == 384 and p.fits
    assert p.step_seconds == pytest.approx(76.8, rel=0.1)  # 153 TFLOP/s, Narayanan 2021, Table 2


@pytest.mark.parametrize("devices", [384, 512])
def test_175b_is_cut_inside_the_node_by_tensors_and_across_by_stages(devices: int) -> None:
    base = Layout(global_batch=1536, sequence=2048)
    found = recommend(find_model("gpt3-175b"), A100, devices, base, keep=40)
    divided = [p for p in found.best if p.layout.zero < 3]
    best = divided[0]
    assert best.layout.tp == 8 and best.layout.pp > 1 and best.fits
    assert "inside a node of 8" in why_first(best)
    for other in divided[1:]:
        assert "longer" in what_loses(best, other) or "as fast" in what_loses(best, other)


def test_tensor_parallelism_stays_inside_the_node() -> None:
    model, base = find_model("gpt3-175b"), Layout(global_batch=64)
    inside = [x.tp for x in layouts(model, A100, 64, base, inside_node=True)]
    outside = [x.tp for x in layouts(model, A100, 64, base, inside_node=False)]
    assert max(inside) == 8 and min(outside) == 16


def test_nothing_fits_says_what_would() -> None:
    model, base = find_model("gpt3-175b"), Layout(global_batch=64)
    found = recommend(model, A100, 8, base)
    assert not found.best and found.nearest is not None
    changes = smallest_change(model, A100, 8, base)
    count = int(changes[0].split()[0])
    assert recommend(model, A100, count, base).best
    # 18 bytes per parameter alone need 40 devices.
    assert 40 <= count <= 64


def test_three_unequal_gpus() -> None:
    model = find_model("llama-2-13b")
    layers, tensors = split_unequal(
        model, Serving(weights="fp16", prompt=512), A100, [24e9, 16e9, 8e9], [0.5, 0.3, 0.2]
    )
    assert layers.parts == (20, 12, 8) and tensors.parts == (20, 12, 8)
    assert layers.fits and tensors.fits
    for split in (layers, tensors):
        weights = sum(memory.weights for memory in split.memory)
        assert weights == pytest.approx(2 * model.parameters, rel=0.001)
    by_memory, _ = split_unequal(model, Serving(), A100, [24e9, 24e9, 8e9])
    assert by_memory.parts == (17, 17, 6)
    with pytest.raises(ValueError, match="2 shares for 3 devices"):
        split_unequal(model, Serving(), A100, [1e9, 1e9, 1e9], [0.5, 0.5])


def test_generation_reads_weights_once_per_token() -> None:
    p = predict_serving("llama-2-7b", Serving(weights="fp16", prompt=16, new_tokens=0), A100)
    read = 2 * find_model("llama-2-7b").parameters / A100.device.memory_bandwidth
    assert read < p.token_seconds < 2 * read
    narrow = predict_serving("llama-2-7b", Serving(weights="int4", prompt=16), A100)
    assert narrow.token_seconds < 0.6 * p.token_seconds
    assert narrow.fullest.weights < 0.31 * p.fullest.weights


def test_kv_cache_is_two_times_layers_heads_and_dimension() -> None:
    model = find_model("llama-3-70b")
    assert kv_cache_bytes_per_token(model) == 2 * 80 * 8 * 128 * 2
    one = predict_serving(model, Serving(tp=8, batch=1, prompt=1000, new_tokens=24), H100)
    assert one.fullest.kv_cache == 2 * 80 * 1 * 128 * 2 * 1024
    sixteen = predict_serving(model, Serving(tp=16, prompt=1000, new_tokens=24), H100)
    assert sixteen.fullest.kv_cache == one.fullest.kv_cache  # a KV head cannot be halved


def test_experts_are_held_by_all_and_used_by_few() -> None:
    dense = predict_serving("mistral-7b", Serving(weights="bf16"), H100)
    moe = predict_serving("mixtral-8x7b", Serving(tp=2, weights="bf16"), H100)
    assert moe.fullest.weights > 3 * dense.fullest.weights
    assert moe.token_seconds < 2 * dense.token_seconds


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="0 devices"):
        recommend(find_model("gpt2"), A100, 0, Layout(sequence=1024))
    with pytest.raises(ValueError, match="no layout of 91 devices"):
        recommend(find_model("gpt2"), A100, 7 * 13, Layout(global_batch=1, sequence=1024))
    with pytest.raises(ValueError, match="batch=0"):
        Serving(batch=0)
    with pytest.raises(ValueError, match="weights='int3'"):
        Serving(weights="int3")


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("h100-96gb", 96),
        ("h200", 141),
        ("b300", 288),
        ("gb200", 186),
        ("mi300x", 192),
        ("l40s", 48),
        ("rtx-4090", 24),
        ("h100-efa", 80),
    ],
)
def test_devices_are_found_by_name_and_say_where_their_numbers_come_from(
    name: str, gigabytes: float
) -> None:
    hardware = find_hardware(name)
    device = hardware.device
    assert device.memory_bytes == gigabytes * 1e9 and device.source and device.watts
    assert 0.3 < device.sustained_fraction < 0.95
    assert hardware.network.bandwidth < hardware.link.bandwidth
    with pytest.raises(ValueError, match="did you mean rtx-4090"):
        find_hardware("rtx-4091")


def test_fsdp_is_not_rejected_where_it_keeps_up() -> None:
    """70B on 64 A100: one layer's parameters are gathered well within another's computation."""
    base = Layout(global_batch=128, sequence=4096)
    found = recommend(find_model("llama-3-70b"), A100, 64, base, keep=100).best
    fsdp = next(p for p in found if p.layout.zero == 3)
    assert fsdp.step_seconds < 1.05 * found[0].step_seconds
    assert fsdp.time.dp_exposed < 0.05 * fsdp.step_seconds
