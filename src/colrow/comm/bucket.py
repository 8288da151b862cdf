"""Several tensors summed over ranks in one collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Phase


def all_reduce_together(
    tensors: Sequence[Tensor], group: ParallelGroup, *, layer: str, phase: Phase = "backward"
) -> list[Tensor]:
    """The sums over the group's ranks, of the tensors' shapes; they share memory.

    Args:
        tensors: of one dtype; each rank gives as many, of the same shapes.
        layer, phase: for the ledger.

    Communicates: one all-reduce of all elements.
    """
    bucket = torch.cat([tensor.flatten() for tensor in tensors])
    total = primitives.all_reduce(bucket, group, layer=layer, phase=phase, in_place=True)
    parts = total.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
