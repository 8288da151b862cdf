"""Matmuls of many experts at once: each row with the weight of its expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT = 8  # elements of 16 bits that torch's kernel reads at once


def grouped_linear(rows: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """``rows[i] @ weights[e].T`` where row ``i`` is of expert ``e``.

    On CUDA in bf16 one kernel (``torch.nn.functional.grouped_mm``); elsewhere a matmul for each
    expert, which is what torch's function does there too, without fp64.

    Args:
        rows: ``[rows, in]``, those of the first expert first.
        weights: ``[experts, out, in]``.
        counts: how many rows each expert has; none is possible.

    Returns:
        ``[rows, out]``. Weights of experts without a row get a gradient of zeros.
    """
    if _one_kernel(rows, weights):
        ends = torch.tensor(counts, device=rows.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
    # One node for all experts: each index of its own would make a gradient of the whole stack.
    each = weights.unbind(0)
    parts = [
        F.linear(part, weight)
        for part, weight, count in zip(rows.split(list(counts)), each, counts, strict=True)
        if count
    ]
    return torch.cat(parts) if parts else F.linear(rows, each[0])


def _one_kernel(rows: Tensor, weights: Tensor) -> bool:
    """Whether torch has a kernel for them: on CUDA, in bf16, with features in whole 16 bytes."""
    aligned = all(size % _ALIGNMENT == 0 for size in weights.shape[1:])
    return rows.is_cuda and rows.dtype == weights.dtype == torch.bfloat16 and aligned
