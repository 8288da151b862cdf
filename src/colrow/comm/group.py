"""The handle that every layer takes: the ranks that share one dimension of the grid."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from colrow.comm.ledger import Ledger


@dataclass(eq=False)
class ParallelGroup:
    """The ranks that share one dimension of the grid, as seen from this rank.

    Layers take one of these as ``tp``. With ``size`` 1 every collective is the identity.

    Attributes:
        group: the process group; None when the group is this process alone.
        rank: this process's rank inside the group.
        size: number of ranks in the group.
        name: the grid dimension, for messages: "tp", "dp" or "pp".
        ledger: where collectives of this group are recorded, while somebody records.
        cuda_by_gloo: whether CUDA tensors of this group travel over Gloo, which takes them for
            collectives but not for messages.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    name: str = "tp"
    ledger: Ledger | None = field(default=None, repr=False)
    cuda_by_gloo: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"{self.name} rank {self.rank} is not below the size {self.size}")
        if self.size > 1 and self.group is None:
            raise ValueError(f"a {self.name} group of {self.size} ranks needs a process group")
        self.cuda_by_gloo = "cuda:gloo" in _backends(self.group)

    @classmethod
    def single(cls, name: str = "tp") -> ParallelGroup:
        """The group of this process alone."""
        return cls(None, 0, 1, name)


def _backends(group: dist.ProcessGroup | None) -> str:
    """Such as "cpu:gloo,cuda:nccl"; "" for a group that torch.distributed did not make."""
    try:
        return dist.get_backend_config(group) if isinstance(group, dist.ProcessGroup) else ""
    except (TypeError, ValueError):
        return ""
