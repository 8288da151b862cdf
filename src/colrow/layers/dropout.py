"""Dropout whose mask is a function of each element's place in the whole, unsplit tensor."""

from __future__ import annotations

import math

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
            key: which mask. By default drawn from torch's CPU generator. This module knows no
                group and cannot compare keys over ranks: with several ranks either seed all of a
                tp group alike (``torch.manual_seed`` with the same number, and equally many draws
                since), or pass the same key. Pass a 0-d int64 tensor under torch.compile.
            dim, partition, rank: when x is a shard, the divided dimension and how it is divided.
        """
        if not self.training or self.p == 0.0:
            return x
        if key is None:
            key = rng.draw_seed()
        keep = self.keep_mask(x, key=key, dim=dim, partition=partition, rank=rank)
        return torch.where(keep, x, 0).mul_(1.0 / (1.0 - self.p))

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
        # From the divided dimension on, elements lie side by side: runs at equal distances.
        axis = 0 if dim is None else dim
        return rng.keep_mask(
            key,
            self.p,
            rows=math.prod(x.shape[:axis]),
            columns=math.prod(x.shape[axis:]),
            first=offset * math.prod(x.shape[axis + 1 :]),
            stride=math.prod(shape[axis:]),
            device=x.device,
        ).view(x.shape)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"
