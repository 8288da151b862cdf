"""Matmuls of many experts at once: each row with the weight of its expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(rows: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """``rows[i] @ weights[e].T`` where row ``i`` is of expert ``e``.

    Args:
        rows: ``[rows, in]``, those of the first expert first.
        weights: ``[experts, out, in]``.
        counts: how many rows each expert has; none is possible.

    Returns:
        ``[rows, out]``. Weights of experts without a row get a gradient of zeros.
    """
    # One node for all experts: each index of its own would make a gradient of the whole stack.
    each = weights.unbind(0)
    parts = [
        F.linear(part, weight)
        for part, weight, count in zip(rows.split(list(counts)), each, counts, strict=True)
        if count
    ]
    if not parts:
        return F.linear(rows, each[0])
    return torch.cat(parts)
