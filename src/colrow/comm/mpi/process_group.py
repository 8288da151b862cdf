"""The process group: torch.distributed's collectives as MPI's non-blocking ones.

Everything is started when it is called and completed when somebody waits, so calls of several
groups may be under way at once; while one is waited for, MPI moves all of them. Each group has a
communicator of its own.
"""

# torch.distributed calls a group with lists and an options object; its stubs know more forms.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from colrow.comm.mpi.buffers import copy_into, raw
from colrow.comm.mpi.exchanges import Exchanges
from colrow.comm.mpi.reductions import Reductions
from colrow.comm.mpi.work import MpiWork


class MpiGroup(Reductions, Exchanges):
    """The ranks of one communicator; called by torch.distributed."""

    supports_coalescing = False

    def _get_backend(self, device: torch.device) -> Any:
        """For the CPU itself, which torch 2.14 asks whether it takes several messages at once."""
        if torch.device(device).type == "cpu":
            return self
        return super()._get_backend(device)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        """The root's tensor."""
        x = tensors[0]
        target = x if x.is_contiguous() else x.contiguous()
        request = self._comm.Ibcast(raw(target), opts.rootRank)
        finish = None if target is x else lambda: copy_into(x, target)
        return self._work([request], list(tensors), "broadcast", finish, target)

    def barrier(self, opts: Any = None) -> MpiWork:
        """Nobody leaves before all have come."""
        return self._work([self._comm.Ibarrier()], [], "barrier")

    # Messages.

    def send(self, tensors: Sequence[Tensor], to: int, tag: int) -> MpiWork:
        """To one rank of the group."""
        x = tensors[0].contiguous()
        return self._work([self._comm.Isend(raw(x), to, tag)], [], f"send to {to}", None, x)

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int) -> MpiWork:
        """From one rank of the group."""
        return self._receive(tensors, source, tag, f"recv from {source}")

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int) -> MpiWork:
        """From whoever sends first."""
        return self._receive(tensors, MPI.ANY_SOURCE, tag, "recv from any rank")

    def _receive(self, tensors: Sequence[Tensor], source: int, tag: int, what: str) -> MpiWork:
        x = tensors[0]
        target = x if x.is_contiguous() else torch.empty_like(x).contiguous()
        request = self._comm.Irecv(raw(target), source, tag)
        status = MPI.Status()

        def finish() -> None:
            arrived, size = status.Get_count(MPI.BYTE), x.numel() * x.element_size()
            if arrived != size:
                raise RuntimeError(
                    f"{what}: the message has {arrived} bytes, but this rank expects {size}: give "
                    "both ranks a tensor of the same size and dtype"
                )
            if target is not x:
                copy_into(x, target)

        return self._work([request], list(tensors), what, finish, target, status)
