"""The parts of a whole put together, and what counts as equal to it in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

_LIMIT = 1e-9


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding in fp64."""
    if a.shape != b.shape:
        return False
    a, b = a.detach().double(), b.detach().double()
    if not a.numel():
        return True
    if torch.equal(a, b):
        return True
    both = torch.isfinite(a) & torch.isfinite(b)
    if not torch.equal(a[~both], b[~both]) and not (a[~both].isnan() & b[~both].isnan()).all():
        return False
    a, b = a[both], b[both]
    scale = float(b.abs().max()) if b.numel() else 0.0
    return not a.numel() or float((a - b).abs().max()) <= _LIMIT * max(scale, 1e-3)


def near(a: Tensor, b: Tensor, scale: float) -> bool:
    """Equal but for rounding, relative to themselves or to a small part of ``scale``."""
    if a.shape != b.shape:
        return False
    if not a.numel():
        return True
    own = float(b.abs().max())
    return float((a - b).abs().max()) <= _LIMIT * max(own, 1e-4 * scale)


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Their sum."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def placed(mine: list[Tensor], dim: int, rows: list[list[int]], like: Tensor) -> Tensor:
    """The ranks' parts added where they belong."""
    total = torch.zeros_like(like)
    for part, indices in zip(mine, rows, strict=True):
        total.index_add_(dim, torch.tensor(indices, dtype=torch.long), part)
    return total
