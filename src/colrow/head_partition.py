"""Who owns which attention heads: the query heads of each rank, and the KV heads that they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colrow.partition import Partition, Range


@dataclass(frozen=True)
class HeadPartition:
    """Attention heads over ranks: query heads, and the KV heads that they read.

    Query head ``q`` reads KV head ``q // (num_heads // num_kv_heads)``. Query heads are split
    contiguously; a rank holds every KV head that its query heads read, so a KV head may be held by
    several ranks (its gradient is then a sum over its holders).
    """

    query: Partition
    key_value: Partition

    @classmethod
    def create(
        cls,
        num_heads: int,
        num_kv_heads: int,
        parts: int,
        *,
        weights: Sequence[float] | None = None,
    ) -> HeadPartition:
        """Splits heads evenly (at most one head between fullest and emptiest) or by ``weights``."""
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"{num_heads} query heads cannot share {num_kv_heads} KV heads equally; "
                "num_heads must be a multiple of num_kv_heads"
            )
        if parts > num_heads:
            raise ValueError(
                f"{num_heads} query heads cannot be split over {parts} ranks; "
                f"use a tensor-parallel size of at most {num_heads}"
            )
        if weights is not None and len(weights) != parts:
            raise ValueError(f"the ratio {list(weights)} does not have one share for {parts} ranks")
        query = (
            Partition.even(num_heads, parts)
            if weights is None
            else Partition.ratio(num_heads, weights)
        )
        if 0 in query.sizes:
            raise ValueError(
                f"the ratio {list(weights or ())} leaves a rank without any of {num_heads} query "
                "heads; give that rank a larger share"
            )
        group = num_heads // num_kv_heads
        kv = tuple((start // group, -(-stop // group)) for start, stop in query.bounds)
        return cls(query, Partition(num_kv_heads, kv))

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.query.length // self.key_value.length

    def runs(self, rank: int) -> tuple[tuple[Range, Range], ...]:
        """Local ``(query heads, KV heads)`` ranges in which every KV head serves equally many.

        At most three: a KV head cut at the start, whole groups, a KV head cut at the end. Each run
        is a grouped-query attention of its own, without a copy of any key or value.
        """
        query_start, query_stop = self.query.bounds[rank]
        kv_start, kv_stop = self.key_value.bounds[rank]
        group = self.group_size
        runs: list[tuple[Range, Range]] = []
        previous = 0
        for kv in range(kv_start, kv_stop):
            first = max(query_start, kv * group) - query_start
            last = min(query_stop, (kv + 1) * group) - query_start
            local = kv - kv_start
            if runs and last - first == previous:
                (run_first, _), (kv_first, _) = runs[-1]
                runs[-1] = ((run_first, last), (kv_first, local + 1))
            else:
                runs.append(((first, last), (local, local + 1)))
            previous = last - first
        return tuple(runs)
