"""The pieces of a layer pair that cannot be torn, and how they go to the ranks. No torch.

Features of a column-parallel layer (rows of its weight) *reach* input features of a row-parallel
one. Features that reach a common one, and features that are reached in common, belong together:
they form an atom. In an MLP an atom is one feature (with its gate), in attention a KV group with
its query heads, whatever the layout of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

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


def distribute(atoms: Sequence[int], ranks: int, *, strided: bool = False) -> list[int]:
    """Each rank's share, as evenly as possible by number: neighbours, or every ``ranks``-th."""
    partition = Partition.even(len(atoms), ranks)
    shares = []
    for rank, (start, stop) in enumerate(partition.bounds):
        share = 0
        for atom in atoms[rank::ranks] if strided else atoms[start:stop]:
            share |= atom
        shares.append(share)
    return shares


def holders(masks: Sequence[int], shares: Sequence[int]) -> list[list[int]]:
    """By rank, the rows that reach something in its share; rows that reach nothing go to all."""
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


def indices_of(spec: ShardSpec, rank: int) -> list[int]:
    """The indices along ``spec.dim`` that a rank holds, in the order of its shard."""
    return [i for start, stop in spec.global_ranges(rank) for i in range(start, stop)]
