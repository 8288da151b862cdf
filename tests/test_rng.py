from __future__ import annotations

import math

import pytest
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


def test_normal_is_box_and_mullers_formula() -> None:
    index = torch.arange(100_000)
    random = [int(b) & MASK for b in rng.bits(9, index)]
    for i in range(0, 100_000, 997):
        radius, turn = ((random[i] >> 32) + 0.5) / 2**32, ((random[i] & 0xFFFFFFFF) + 0.5) / 2**32
        expected = math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * turn)
        actual = rng.normal(9, index[i : i + 1]).item()
        assert abs(actual - expected) <= 6e-8 * max(1, abs(expected))


def test_logarithm_and_cosine() -> None:
    """Against math's, over the range that they are used in and at its ends."""
    edges = [2.0**-33, 1 - 2.0**-33, 0.25, 0.5, 0.75, math.sqrt(0.5), 1e-5]
    x = torch.cat([torch.tensor(edges, dtype=torch.float64), rng.uniform(1, torch.arange(20_000))])
    log = torch.tensor([math.log(v) for v in x.tolist()], dtype=torch.float64)
    cos = torch.tensor([math.cos(2 * math.pi * v) for v in x.tolist()], dtype=torch.float64)
    assert ((rng._log(x) - log).abs() / log.abs()).max() < 1e-12
    assert (rng._cos_of_turn(x) - cos).abs().max() < 1e-12


def test_a_value_does_not_depend_on_its_neighbours() -> None:
    """To the last bit before rounding: in any length, at any offset, with any number of threads."""
    x = rng.uniform(2, torch.arange(100_003))
    threads = torch.get_num_threads()
    for function in (rng._log, rng._cos_of_turn):
        whole = function(x)
        for count in (1, 3):
            torch.set_num_threads(count)
            try:
                assert torch.equal(function(x), whole)
            finally:
                torch.set_num_threads(threads)
        for length in (1, 2, 3, 7, 13, 65):
            parts = [function(part.clone()) for part in x[5:2000].split(length)]
            assert torch.equal(torch.cat(parts), whole[5:2000])
        assert torch.equal(function(x[::3]), whole[::3])


@pytest.mark.parametrize("chunk", [1, 8, 50, 1 << 18])
def test_kept_are_those_whose_uniform_number_is_at_least_p(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(rng, "_CHUNK", chunk)
    cpu = torch.device("cpu")
    for key, p in ((3, 0.1), (-(2**63), 0.5), (2**63 - 1, 0.9)):
        for rows, columns, first, stride in ((1, 60, 0, 60), (7, 13, 5, 20), (9, 0, 0, 4)):
            at = torch.arange(rows)[:, None] * stride + torch.arange(columns) + first
            for number in (key, torch.tensor(key)):
                keep = rng.keep_mask(
                    number, p, rows=rows, columns=columns, first=first, stride=stride, device=cpu
                )
                assert torch.equal(keep, rng.uniform(key, at) >= p)
    for p, share in ((0.0, 1.0), (1 - 1e-12, 0.0)):
        keep = rng.keep_mask(1, p, rows=1, columns=999, first=0, stride=999, device=cpu)
        assert keep.double().mean() == share


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
