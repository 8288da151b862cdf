from __future__ import annotations

import pytest
import torch

from colrow import ParallelDropout, ParallelGroup, Partition, rng
from tests.layers.dense import assert_close, divided, part, raises, random
from tests.ranks import RankPool

SHAPE = (3, 7, 10)
P = 0.3


def specified_mask(key: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The specification: element i in row-major order stays where stream ``key`` is at least p."""
    count = torch.Size(shape).numel()
    return rng.uniform(key, torch.arange(count)).view(shape) >= P


def check_parts_of_one_mask(tp: ParallelGroup) -> None:
    """A shard's mask is its part of the unsplit mask, along any dimension, even or uneven."""
    dropout, key = ParallelDropout(P), 1234
    whole = random(*SHAPE)
    expected = whole * specified_mask(key, SHAPE) / (1 - P)
    for dim in (0, 1, 2, -1, -2):
        p = Partition.even(SHAPE[dim], tp.size)
        spec = divided(whole, dim, p)
        x = part(whole, spec, tp.rank).clone().requires_grad_()
        y = dropout(x, key=key, dim=dim, partition=p, rank=tp.rank)
        assert_close(y, part(expected, spec, tp.rank), 1e-15, f"dim {dim}")
        y.sum().backward()
        mask = part(specified_mask(key, SHAPE), spec, tp.rank)
        assert x.grad is not None
        assert_close(x.grad, mask.double() / (1 - P), 1e-15, f"gradient {dim}")
        tensor_key = torch.tensor(key)
        assert torch.equal(dropout(x, key=tensor_key, dim=dim, partition=p, rank=tp.rank), y)


def outside_the_parallel_region(tp: ParallelGroup) -> torch.Tensor:
    """All ranks drop the same elements without being told how; each call drops others."""
    dropout = ParallelDropout(P)
    x = torch.ones(SHAPE)
    first, second = dropout(x), dropout(x)
    assert not torch.equal(first, second) and torch.equal(x, torch.ones(SHAPE))
    return first


def inside_the_parallel_region(tp: ParallelGroup) -> torch.Tensor:
    whole = Partition.even(12 * tp.size, tp.size)
    return ParallelDropout(P)(torch.ones(5, 12), dim=1, partition=whole, rank=tp.rank)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_masks_of_shards_are_parts_of_one_mask(ranks: RankPool, n: int) -> None:
    ranks(n, check_parts_of_one_mask)


def test_masks_agree_outside_and_differ_inside(ranks: RankPool) -> None:
    outside = [ranks(n, outside_the_parallel_region) for n in (1, 2, 3)]
    assert all(torch.equal(mask, outside[0][0]) for masks in outside for mask in masks)
    first, second, third = ranks(3, inside_the_parallel_region)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_keeps_the_expected_share_and_scales_it() -> None:
    y = ParallelDropout(P)(torch.ones(100_000), key=3)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - P)).item()}
    assert abs((y > 0).double().mean().item() - (1 - P)) < 0.008
    half = ParallelDropout(P)(torch.ones(10, dtype=torch.bfloat16), key=3)
    assert half.dtype == torch.bfloat16


def test_does_nothing_in_evaluation_and_without_probability() -> None:
    x = random(*SHAPE)
    assert ParallelDropout(P).eval()(x) is x
    state = torch.get_rng_state()
    assert ParallelDropout(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_what_does_not_fit_is_refused() -> None:
    for p in (-0.1, 1.0, 1.5):
        with raises(ValueError, f"dropout p={p}", "below 1"):
            ParallelDropout(p)
    dropout, x = ParallelDropout(P), torch.ones(4, 6)
    with raises(ValueError, "dim", "partition"):
        dropout(x, dim=1)
    with raises(ValueError, "dim", "partition"):
        dropout(x, partition=Partition.even(6, 1))
    with raises(ValueError, "dimension 1 should be 4, not 6"):
        dropout(x, dim=1, partition=Partition.even(8, 2), rank=1)
