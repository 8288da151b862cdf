"""Which features of a pair of layers must stay on one rank, and which indices a rank then holds.

Features of a column-parallel layer (rows of its weight) *reach* input features of a row-parallel
one. Features that reach a common one, and features that are reached in common, must lie on one
rank: they form a *shard group*. In an MLP that is one feature (with its gate), in attention a KV
head with its query heads, whatever the layout of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from colrow.partition import Partition, ShardSpec


def connected(count: int, masks: Sequence[int]) -> list[int]:
    """The parts of ``range(count)`` that these sets connect, as sets, in order of their minimum.

    A set is an integer whose bit j says whether it holds j.
    """
    parts: list[int] = []
    for mask in dict.fromkeys(masks):
        if not mask:
            continue
        kept = []
        for part in parts:
            if part & mask:
                mask |= part
            else:
                kept.append(part)
        kept.append(mask)
        parts = kept
    covered = 0
    for part in parts:
        covered |= part
    parts += [1 << j for j in range(count) if not covered >> j & 1]
    return sorted(parts, key=lambda part: part & -part)


def members(mask: int) -> list[int]:
    """The elements of a set that is written as an integer."""
    found, j = [], 0
    while mask:
        if mask & 1:
            found.append(j)
        mask >>= 1
        j += 1
    return found


def distribute(groups: Sequence[int], ranks: int, *, strided: bool = False) -> list[int]:
    """Each rank's share of shard groups, as evenly as possible by number.

    Args:
        strided: whether a rank gets every ``ranks``-th, instead of neighbours.
    """
    partition = Partition.even(len(groups), ranks)
    shares = []
    for rank, (start, stop) in enumerate(partition.bounds):
        share = 0
        for group in groups[rank::ranks] if strided else groups[start:stop]:
            share |= group
        shares.append(share)
    return shares


def holders(masks: Sequence[int], shares: Sequence[int]) -> list[list[int]]:
    """By rank, the rows that reach a feature of its share; rows that reach nothing go to all."""
    return [[row for row, mask in enumerate(masks) if not mask or mask & share] for share in shares]


def spec_of_rows(shape: Sequence[int], dim: int, rows: Sequence[Sequence[int]]) -> ShardSpec:
    """The ShardSpec in which rank r holds the ascending indices ``rows[r]`` of ``dim``."""
    runs = [_runs(indices) for indices in rows]
    starts, inside, ends = [0], set[int](), [0] * len(rows)
    for start, rank, stop in sorted((a, rank, b) for rank, own in enumerate(runs) for a, b in own):
        if rank in inside:  # its second range: a block has one for each rank
            starts.append(start)
            inside = {other for other in inside if ends[other] > start}
        inside.add(rank)
        ends[rank] = stop
    partitions = [
        Partition(stop - start, tuple(_within(own, start, stop) for own in runs))
        for start, stop in pairwise([*starts, shape[dim]])
    ]
    return ShardSpec(tuple(shape), dim, tuple(partitions))


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending indices as ranges."""
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and found[-1][1] == index:
            found[-1] = found[-1][0], index + 1
        else:
            found.append((index, index + 1))
    return found


def _within(runs: list[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """The one range between ``start`` and ``stop``, counted from ``start``."""
    for first, last in runs:
        if first < stop and last > start:
            return max(first, start) - start, min(last, stop) - start
    return 0, 0


def indices_by_rank(partition: Partition) -> list[list[int]]:
    """The indices that each rank holds."""
    return [list(range(start, stop)) for start, stop in partition.bounds]


def indices_of(spec: ShardSpec, rank: int) -> list[int]:
    """The indices along ``spec.dim`` that a rank holds, in the order of its shard."""
    return [i for start, stop in spec.global_ranges(rank) for i in range(start, stop)]


def take(x: Tensor, dim: int, indices: list[int]) -> Tensor:
    """The part of a tensor at these indices of ``dim``."""
    return x.index_select(dim, torch.tensor(indices, dtype=torch.long, device=x.device))


def take_periodic(x: Tensor, dim: int, period: int, indices: list[int]) -> Tensor:
    """The part of a tensor at these indices of each period along ``dim``."""
    length = x.shape[dim]
    if length % period:
        raise ValueError(f"dimension {dim} of shape {tuple(x.shape)} is not made of {period}s")
    parts = x.unflatten(dim, (length // period, period))
    return take(parts, dim + 1, indices).flatten(dim, dim + 1)
