"""Who owns which indices of a tensor dimension.

A :class:`Partition` divides one dimension over ranks; a :class:`ShardSpec` says how a whole
parameter is divided. Every part of the program that needs to know - layers when they allocate,
loading when it reads, resharding, verification, the planner - asks these two values. Plain Python:
nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Range = tuple[int, int]


@dataclass(frozen=True)
class Partition:
    """The half-open index range of a dimension that each rank holds.

    Ranges may be uneven and, where several ranks hold the same indices (replicated dimensions, KV
    heads that are read by query heads of two ranks), they may overlap. Every index has a holder.

    Attributes:
        length: global length of the dimension.
        bounds: ``(start, stop)`` for each rank, in rank order.
    """

    length: int
    bounds: tuple[Range, ...]

    def __post_init__(self) -> None:
        if not self.bounds:
            raise ValueError("a partition needs at least one rank")
        for rank, (start, stop) in enumerate(self.bounds):
            if not 0 <= start <= stop <= self.length:
                raise ValueError(
                    f"rank {rank} cannot hold [{start}, {stop}) of a dimension of {self.length}"
                )
        covered = 0
        for start, stop in sorted(self.bounds):
            if start > covered:
                raise ValueError(f"no rank holds index {covered} of a dimension of {self.length}")
            covered = max(covered, stop)
        if covered < self.length:
            raise ValueError(f"no rank holds index {covered} of a dimension of {self.length}")

    @classmethod
    def even(cls, length: int, parts: int) -> Partition:
        """As even as possible: the remainder goes, one index each, to the first ranks."""
        _check_counts(length, parts)
        share, remainder = divmod(length, parts)
        return cls.from_sizes([share + (rank < remainder) for rank in range(parts)])

    @classmethod
    def ratio(cls, length: int, weights: Sequence[float], *, grain: int = 1) -> Partition:
        """In proportion to ``weights`` (any positive scale), in units of ``grain`` indices.

        Each share is rounded down to whole units; the units that are left go to the ranks whose
        exact share lost most by rounding (largest remainder). ``length`` must be a multiple of
        ``grain``.
        """
        _check_counts(length, len(weights))
        if grain < 1 or length % grain:
            raise ValueError(f"a dimension of {length} is not made of units of {grain}")
        if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
            raise ValueError(
                f"ratio {list(weights)} must be finite and non-negative with a positive sum"
            )
        units, total = length // grain, sum(weights)
        exact = [units * weight / total for weight in weights]
        shares = [int(share) for share in exact]
        by_loss = sorted(range(len(weights)), key=lambda rank: shares[rank] - exact[rank])
        for rank in by_loss[: units - sum(shares)]:
            shares[rank] += 1
        return cls.from_sizes([share * grain for share in shares])

    @classmethod
    def replicated(cls, length: int, parts: int) -> Partition:
        """Every rank holds everything."""
        _check_counts(length, parts)
        return cls(length, ((0, length),) * parts)

    @classmethod
    def from_sizes(cls, sizes: Sequence[int]) -> Partition:
        """Contiguous, disjoint ranges of these sizes, in rank order."""
        starts = [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]
        return cls(starts[-1], tuple(pairwise(starts)))

    @property
    def parts(self) -> int:
        """Number of ranks."""
        return len(self.bounds)

    def size(self, rank: int) -> int:
        """How many indices ``rank`` holds."""
        start, stop = self.bounds[rank]
        return stop - start

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many indices each rank holds."""
        return tuple(stop - start for start, stop in self.bounds)

    @property
    def largest(self) -> int:
        """The most that any rank holds: what uneven collectives are padded to."""
        return max(self.sizes)

    @property
    def is_split(self) -> bool:
        """Whether the ranges lie side by side in rank order, so that each index has one holder."""
        return all(before[1] == after[0] for before, after in pairwise(self.bounds))

    @property
    def shared(self) -> tuple[Range, ...]:
        """The ranges that more than one rank holds, in order, each merged as far as it goes."""
        events: dict[int, int] = {}
        for start, stop in self.bounds:
            if start < stop:
                events[start] = events.get(start, 0) + 1
                events[stop] = events.get(stop, 0) - 1
        found: list[Range] = []
        holders, opened = 0, 0
        for index in sorted(events):
            before, holders = holders, holders + events[index]
            if before < 2 <= holders:
                opened = index
            elif holders < 2 <= before:
                found.append((opened, index))
        return tuple(found)

    def scaled(self, unit: int) -> Partition:
        """The same ownership where each index stands for ``unit`` rows: heads to their rows."""
        return Partition(
            self.length * unit, tuple((start * unit, stop * unit) for start, stop in self.bounds)
        )


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter is divided over the ranks of a tensor-parallel group.

    Attributes:
        shape: global shape.
        dim: the dimension that is divided, or None when every rank holds the whole tensor.
        blocks: the partitions that lie side by side along ``dim``; one for a plain weight, three
            for a fused Q, K, V weight, two for fused gate and up. A rank's shard is its range of
            the first block, then of the second, and so on.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    blocks: tuple[Partition, ...] = ()

    def __post_init__(self) -> None:
        if self.dim is None:
            return
        if not 0 <= self.dim < len(self.shape):
            raise ValueError(f"shape {self.shape} has no dimension {self.dim}")
        if sum(b.length for b in self.blocks) != self.shape[self.dim]:
            raise ValueError(
                f"blocks of {[b.length for b in self.blocks]} do not make up dimension {self.dim} "
                f"of shape {self.shape}"
            )
        for block in self.blocks:
            if block.parts != self.blocks[0].parts:
                raise ValueError(
                    f"blocks of one parameter are divided over {self.blocks[0].parts} and "
                    f"{block.parts} ranks"
                )

    @classmethod
    def replicated(cls, *shape: int) -> ShardSpec:
        """The whole tensor on every rank."""
        return cls(tuple(shape))

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the shard that ``rank`` holds."""
        if self.dim is None:
            return self.shape
        local = sum(block.size(rank) for block in self.blocks)
        return (*self.shape[: self.dim], local, *self.shape[self.dim + 1 :])

    def local_offsets(self, rank: int) -> tuple[int, ...]:
        """Where each block's range begins inside the shard of ``rank``, along ``dim``."""
        sizes = [block.size(rank) for block in self.blocks]
        return tuple(sum(sizes[:i]) for i in range(len(sizes)))

    def global_ranges(self, rank: int) -> tuple[Range, ...]:
        """The shard's ranges along ``dim`` in the coordinates of the whole tensor."""
        ranges, offset = [], 0
        for block in self.blocks:
            start, stop = block.bounds[rank]
            ranges.append((offset + start, offset + stop))
            offset += block.length
        return tuple(ranges)


def parse_shares(given: str | Sequence[float], what: str) -> tuple[float, ...]:
    """The numbers of "0.5,0.3,0.2", or such numbers themselves.

    Args:
        what: what they divide, for the message: "layer split".

    Raises:
        ValueError: for something else, or numbers that are not positive.
    """
    try:
        numbers = tuple(float(n) for n in (given.split(",") if isinstance(given, str) else given))
    except ValueError as error:
        raise ValueError(
            f"the {what} {given!r} should be numbers with commas between, such as 3,1 or "
            "0.5,0.3,0.2"
        ) from error
    if not numbers or not all(n > 0 and math.isfinite(n) for n in numbers):
        raise ValueError(f"the {what} {given!r} should have positive numbers only")
    return numbers


def _check_counts(length: int, parts: int) -> None:
    if length < 0 or parts < 1:
        raise ValueError(f"cannot divide a dimension of {length} over {parts} ranks")
