from __future__ import annotations

import math

import torch

from colrow import rng
from colrow.partition import Partition, ShardSpec

MASK = (1 << 64) - 1


def splitmix64(key: int, index: int) -> int:
    """The published algorithm in plain integers."""
    z = (key + index * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_bits_are_those_of_splitmix64() -> None:
    index = torch.tensor([0, 1, 2, 1000, 2**40])
    for key in (0, 1, rng.stream_key(3, "name"), 2**63 - 1):
        expected = [splitmix64(key, int(i)) for i in index]
        assert [int(b) & MASK for b in rng.bits(key, index)] == expected
    # The first outputs for seed 0 of the authors' program, which counts from 1.
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(b) & MASK for b in rng.bits(0, torch.arange(1, 4))] == known


def test_uniform_is_inside_the_open_interval_and_uniform() -> None:
    values = rng.uniform(rng.stream_key(0, "u"), torch.arange(200_000))
    assert values.dtype == torch.float64 and values.min() > 0 and values.max() < 1
    assert abs(values.mean().item() - 0.5) < 3e-3
    counts = torch.histc(values, 10, 0, 1)
    assert (counts - 20_000).abs().max() < 700  # five standard deviations
    between = rng.uniform_between(5, torch.arange(10_000), 0.25)
    assert between.dtype == torch.float32 and between.abs().max() < 0.25
    assert between.min() < -0.24 and between.max() > 0.24


def test_normal_is_standard_normal() -> None:
    values = rng.normal(rng.stream_key(0, "n"), torch.arange(200_000)).double()
    assert abs(values.mean().item()) < 0.012 and abs(values.std().item() - 1) < 0.008
    for limit in (0.5, 1.0, 2.0, 3.0):
        share = (values.abs() < limit).double().mean().item()
        assert abs(share - math.erf(limit / math.sqrt(2))) < 0.006
    assert abs((values[1:] * values[:-1]).mean().item()) < 0.012  # neighbours are unrelated


def test_keys_of_different_names_differ_and_do_not_depend_on_the_process() -> None:
    names = [(0,), (0, "a"), (0, "b"), (1, "a"), (0, "a", "b"), (0, "ab"), (0, "a", 1), (0, 1, "a")]
    keys = [rng.stream_key(*name) for name in names]
    assert len(set(keys)) == len(names) and all(0 <= key < 2**63 for key in keys)
    assert rng.stream_key(0, "a") == 3269621562527583764


def test_derived_keys_are_the_same_for_numbers_and_tensors() -> None:
    for key in (0, 5, 2**62, 2**63 - 1, -7):
        number = rng.derived_key(key, "attention", 3)
        tensor = rng.derived_key(torch.tensor(key), "attention", 3)
        assert isinstance(tensor, torch.Tensor) and int(tensor) == number
        assert number != rng.derived_key(key, "mlp", 3)


def test_draw_seed_follows_torchs_cpu_generator() -> None:
    torch.manual_seed(7)
    first, second = rng.draw_seed(), rng.draw_seed()
    torch.manual_seed(7)
    assert first == rng.draw_seed() and first != second
    torch.manual_seed(7)
    with torch.device("meta"):  # wherever new tensors go
        assert rng.draw_seed() == first


def test_shards_hold_what_the_whole_holds() -> None:
    def draw(at: torch.Tensor) -> torch.Tensor:
        return rng.normal(11, at)

    rows, columns = 37, 23
    whole = torch.empty(rows, columns)
    rng.fill_shard_(whole, ShardSpec.replicated(rows, columns), 0, draw)
    assert torch.equal(whole, draw(torch.arange(rows * columns)).view(rows, columns))
    for dim, parts in ((0, 4), (1, 3)):
        partition = Partition.even((rows, columns)[dim], parts)
        spec = ShardSpec((rows, columns), dim, (partition,))
        for rank in range(parts):
            shard = torch.empty(spec.local_shape(rank))
            rng.fill_shard_(shard, spec, rank, draw)
            assert torch.equal(shard, whole.narrow(dim, partition.bounds[rank][0], shard.size(dim)))
    fused = ShardSpec((rows, columns), 0, (Partition.even(30, 2), Partition.replicated(7, 2)))
    shard = torch.empty(fused.local_shape(1))
    rng.fill_shard_(shard, fused, 1, draw)
    assert torch.equal(shard, torch.cat([whole[15:30], whole[30:37]]))
    vector = torch.empty(20, dtype=torch.float64)
    rng.fill_shard_(vector, ShardSpec((40,), 0, (Partition.even(40, 2),)), 1, draw)
    assert torch.equal(vector, draw(torch.arange(20, 40)).double())


def test_large_shards_are_drawn_in_pieces_with_the_same_result() -> None:
    shape = (3, rng._CHUNK // 2 + 1)
    whole = torch.empty(shape)
    rng.fill_shard_(whole, ShardSpec.replicated(*shape), 0, lambda at: rng.uniform(3, at))
    assert torch.equal(whole.flatten(), rng.uniform(3, torch.arange(whole.numel())).float())


def test_nothing_is_drawn_on_meta() -> None:
    def draw(at: torch.Tensor) -> torch.Tensor:
        raise AssertionError("drawn")

    rng.fill_shard_(torch.empty(2, 2, device="meta"), ShardSpec.replicated(2, 2), 0, draw)
