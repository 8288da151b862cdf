"""Dropout whose mask is a function of each element's place in the whole, unsplit tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from colrow import rng
from colrow.comm import primitives
from colrow.partition import Partition


class ParallelDropout(nn.Module):
    """Dropout with the mask that one device would have drawn, at any tensor-parallel size.

    Where all ranks hold the same tensor their masks agree; where each holds a shard, their masks
    are the matching parts of one mask, and so differ. Nothing is sent.

    Args:
        p: probability of zeroing an element; the others are scaled by 1 / (1 - p).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout p={p}: must be at least 0 and below 1")
        self.p = p

    def forward(
        self,
        x: Tensor,
        *,
        key: int | Tensor | None = None,
        dim: int | None = None,
        partition: Partition | None = None,
        rank: int = 0,
    ) -> Tensor:
        """Drops elements in training, does nothing otherwise.

        Args:
            x: the tensor, or this rank's shard of it.
            key: which mask. By default drawn from torch's CPU generator, which all ranks must have
                seeded alike. Pass a 0-d int64 tensor under torch.compile.
            dim, partition, rank: when x is a shard, the divided dimension and how it is divided.
        """
        if not self.training or self.p == 0.0:
            return x
        if key is None:
            key = rng.draw_seed()
        keep = self.keep_mask(x, key=key, dim=dim, partition=partition, rank=rank)
        return x * keep.to(x.dtype) / (1.0 - self.p)

    def keep_mask(
        self,
        x: Tensor,
        *,
        key: int | Tensor,
        dim: int | None = None,
        partition: Partition | None = None,
        rank: int = 0,
    ) -> Tensor:
        """True where an element of ``x`` stays; arguments as for the forward pass."""
        shape, offset = list(x.shape), 0
        if (dim is None) != (partition is None):
            raise ValueError("dropout of a shard needs both dim and partition")
        if dim is not None and partition is not None:
            dim %= x.dim()
            primitives.check_length(x, dim, partition.size(rank), "the shard to drop out")
            shape[dim], offset = partition.length, partition.bounds[rank][0]
        position = torch.zeros((), dtype=torch.int64, device=x.device)
        for axis, length in enumerate(x.shape):
            along = torch.arange(length, device=x.device)
            if axis == dim:
                along = along + offset
            position = position.unsqueeze(-1) * shape[axis] + along
        return rng.uniform(key, position) >= self.p

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"
