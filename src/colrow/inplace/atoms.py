"""The pieces of a layer pair that cannot be torn, and how they go to the ranks. No torch.

Features of a column-parallel layer (rows of its weight) *reach* input features of a row-parallel
one. Features that reach a common one, and features that are reached in common, belong together:
they form an atom. In an MLP an atom is one feature (with its gate), in attention a KV group with
its query heads, whatever the layout of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    held = [set(indices) for indices in rows]
    blocks: list[list[list[int]]] = []  # for each block, each rank's indices
    starts: list[int] = []
    closed: list[bool] = []
    for index in range(shape[dim]):
        again = blocks and any(
            index in mine and done and block
            for mine, done, block in zip(held, closed, blocks[-1], strict=True)
        )
        if not blocks or again:
            blocks.append([[] for _ in held])
            starts.append(index)
            closed = [False] * len(held)
        for rank, mine in enumerate(held):
            if index in mine:
                blocks[-1][rank].append(index)
            elif blocks[-1][rank]:
                closed[rank] = True
    partitions = []
    for number, (start, block) in enumerate(zip(starts, blocks, strict=True)):
        stop = starts[number + 1] if number + 1 < len(starts) else shape[dim]
        bounds = tuple(
            (mine[0] - start, mine[-1] + 1 - start) if mine else (0, 0) for mine in block
        )
        partitions.append(Partition(stop - start, bounds))
    return ShardSpec(tuple(shape), dim, tuple(partitions))


def indices_of(spec: ShardSpec, rank: int) -> list[int]:
    """The indices along ``spec.dim`` that a rank holds, in the order of its shard."""
    return [i for start, stop in spec.global_ranges(rank) for i in range(start, stop)]
