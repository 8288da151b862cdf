"""Grouped-query attention where a rank's KV heads need not all serve equally many query heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from colrow.partition import Range


def group_sizes(runs: Sequence[tuple[Range, Range]]) -> list[int]:
    """Query heads of each KV head."""
    return [(q1 - q0) // (kv1 - kv0) for (q0, q1), (kv0, kv1) in runs for _ in range(kv0, kv1)]


def padded_groups(runs: Sequence[tuple[Range, Range]]) -> tuple[list[int], list[int]]:
    """Query heads, the last of a smaller group repeated, and where each head then stands."""
    sizes = group_sizes(runs)
    widest, first = max(sizes), 0
    padded: list[int] = []
    unpadded: list[int] = []
    for size in sizes:
        unpadded += range(len(padded), len(padded) + size)
        padded += [first + min(i, size - 1) for i in range(widest)]
        first += size
    return padded, unpadded


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Attention of ``[batch, heads, queries, dim]`` where every KV head serves equally many.

    Values may have another last size than queries and keys.
    """
    batch, q_heads, queries, dim = q.shape
    kv_heads = k.shape[1]
    if queries == 1 and q_heads != kv_heads:
        # One query: its group of heads becomes the query axis, and no key or value is repeated.
        q = q.view(batch, kv_heads, q_heads // kv_heads, dim)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.view(mask.shape[0], kv_heads, q_heads // kv_heads, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        return mixed.view(batch, q_heads, 1, -1)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        is_causal=mask is None and queries > 1,
        scale=scale,
        enable_gqa=q_heads != kv_heads,
    )
