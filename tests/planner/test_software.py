"""What programs do differently with the same layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from colrow.models.stages import LayerSplit
from colrow.planner import Layout, ModelShape, find_hardware, find_model, predict
from colrow.planner.catalog import shape_of_sizes
from colrow.planner.compute import ends_pass
from colrow.planner.links import Link, measured_link


@pytest.fixture(scope="module")
def tied() -> ModelShape:
    """The playbook's model: a head of 3.55 blocks."""
    sizes = {"hidden": 3072, "layers": 28, "heads": 32, "ffn": 8192, "vocab": 131072}
    model = shape_of_sizes("3b", "llama", positions=4096, **sizes)
    return replace(model, config=replace(model.config, tie_embeddings=True))


def _nanotron(**sizes: int) -> Layout:
    batch = sizes.pop("batch", 256)
    return Layout(global_batch=batch, sequence=4096, software="nanotron", **sizes)


def test_stages_are_as_the_program_cuts_them(tied: ModelShape) -> None:
    for pp, expected in ((2, (16, 12)), (4, (8, 8, 8, 4)), (8, (4,) * 7 + (0,))):
        assert _nanotron(pp=pp).layers_of_stage(tied) == expected
        even = Layout(pp=pp, software="megatron-core").layers_of_stage(tied)
        assert max(even) - min(even) <= 1 and sum(even) == 28
        own = Layout(pp=pp).layers_of_stage(tied)
        assert own == LayerSplit.create(tied.config, pp).sizes
    assert Layout(pp=2, stage_layers=(20, 8)).layers_of_stage(tied) == (20, 8)


def test_interleaved_stages_need_not_be_equal() -> None:
    """126 layers in two turns round 8 devices, as torchtitan trained Llama 3.1 405B."""
    model = find_model("llama-3.1-405b")
    layout = Layout(pp=8, global_batch=8, schedule="interleaved", virtual_stages=2)
    sizes = layout.layers_of_stage(model)
    assert sum(sizes) == 126 and set(sizes) == {15, 16}
    assert [sum(kinds.values()) for kinds in layout.kinds_of_stages(model)] == list(sizes)


def test_gradients_wait_in_buckets_where_there_are_replicas(tied: ModelShape) -> None:
    """18 bytes a parameter on one replica of nanotron, 20 on several."""
    alone, several = (
        predict(tied, _nanotron(tp=8, dp=dp, batch=16), "h100").memory.fullest for dp in (1, 2)
    )
    parameters = alone.weights / 2
    assert alone.model_states == pytest.approx(18 * parameters, rel=1e-6)
    assert several.model_states == pytest.approx(20 * parameters, rel=1e-6)


def test_zero_that_does_not_overlap_is_waited_for(tied: ModelShape) -> None:
    """On 32 nodes 7.15 GB of weights and 14.3 GB of gradients at 28 GB/s: 0.77 s."""
    layout = _nanotron(dp=256, zero=1)
    waiting = predict(tied, layout, "h100-efa").time.dp_exposed
    assert waiting == pytest.approx(0.77, rel=0.05)
    hidden = predict(tied, replace(layout, software="megatron-core"), "h100-efa")
    assert hidden.time.dp_exposed < 0.9 * waiting


def test_stages_over_a_shared_network_stall_the_host(tied: ModelShape) -> None:
    layout = _nanotron(tp=8, pp=2, dp=1)
    shared, own = (predict(tied, layout, gpu).time for gpu in ("h100-efa", "h100"))
    more = shared.launches - own.launches
    assert more == pytest.approx(256 * 16 * 2 * 8 * 1.09e-3, rel=0.2)


def test_frozen_heads_and_eight_bits() -> None:
    """The head is multiplied in 16 bits, and has no weight gradient beside adapters."""
    base = Layout(tp=2, sequence=4096, sequence_parallel=True, software="megatron-core-default")
    model, eight = find_model("llama-3-8b"), replace(base, precision="fp8")
    device = find_hardware("h100").device
    heads = [
        ends_pass(model, layout.per_microbatch, device)[1]
        for layout in (base, eight, replace(base, lora_rank=16))
    ]
    assert heads[0].forward == heads[1].forward == heads[2].forward
    assert heads[1].backward.weight_gradients == heads[0].backward.weight_gradients > 0
    assert heads[2].backward.weight_gradients == 0
    wide, narrow, unfused = (
        predict(model, layout, "h100").time
        for layout in (base, eight, replace(eight, software="colrow"))
    )
    assert narrow.tp_exposed < wide.tp_exposed  # gathers send half of the bytes
    assert narrow.elementwise < unfused.elementwise


def test_a_token_travels_once_to_each_rank_with_its_experts() -> None:
    """8 of 128 experts are expected on 8 (1 - (7/8)^8) = 5.25 of 8 ranks."""
    model = find_model("qwen3-30b-a3b")
    layout = Layout(dp=8, ep=8, microbatch=16, sequence=8192, software="megatron-core")
    once, each = (
        predict(model, replace(layout, software=name), "gb200").time.ep_exposed
        for name in ("megatron-core", "megatron-core-default")
    )
    assert once / each == pytest.approx(5.25 / 8, rel=0.02)


def test_a_link_is_as_fast_as_measured_with_so_many_ranks() -> None:
    sizes = [float(1 << 20), float(1 << 26)]
    link = measured_link(
        [("all_reduce", 2, sizes, [1e-3, 5e-3]), ("all_reduce", 8, sizes, [2e-3, 8e-3])], "test"
    )
    for ranks, seconds in ((2, 5e-3), (8, 8e-3)):
        assert link.collective_seconds("all_reduce", sizes[1], ranks) == pytest.approx(seconds)
    assert 5e-3 < link.collective_seconds("all_reduce", sizes[1], 4) < 8e-3
    far = Link(1e9, 0.0, stage_waits=((32, 0.0), (64, 0.25)))
    assert [far.stage_wait_seconds(n) for n in (8, 48, 128)] == [0.0, 0.125, 0.5]
