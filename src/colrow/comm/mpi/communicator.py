"""A group's communicator: what it has under way, its waits, its end."""

# torch.distributed calls a group with lists and an options object; its stubs know more forms.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from colrow.comm.mpi import BACKEND
from colrow.comm.mpi.patience import Patience
from colrow.comm.mpi.peers import Peers
from colrow.comm.mpi.work import MpiWork
from colrow.launch.places import moved

_SWEEP_AT = 64


class Communicator(dist.ProcessGroup):
    """The part of a process group that the collectives stand on.

    Args:
        rank: of this process in the group.
        communicator: of the group alone.
        timeout: how long a wait may take.
        members: the ranks of the world that form the group.
        peers: who watches their processes.
    """

    def __init__(
        self,
        rank: int,
        communicator: MPI.Intracomm,
        timeout: timedelta,
        members: Sequence[int],
        peers: Peers,
    ) -> None:
        super().__init__(rank, len(members))  # type: ignore[call-arg]
        self._comm, self._timeout = communicator, timeout
        self._rank, self._ranks = rank, len(members)
        self._members, self._peers = members, peers
        self._name = self._description = "undefined"
        self.pending: set[MpiWork] = set()  # MPI uses their memory, whoever still holds the work
        self._sweep_at = _SWEEP_AT
        self.failed = self._closed = False  # failed: a wait ended without its result

    def keep(self, work: MpiWork) -> None:
        """Holds a work until it is complete, also one that nobody will wait for."""
        moved()
        self.pending.add(work)
        if len(self.pending) > self._sweep_at:
            for other in tuple(self.pending):
                other.is_completed()
            self._sweep_at = max(_SWEEP_AT, 2 * len(self.pending))

    def patience(self, what: str, timeout: timedelta | None) -> Patience:
        """For a wait; ``timeout``, if given and positive, in place of the group's own."""
        limit = timeout if timeout is not None and timeout > timedelta() else self._timeout
        name = f"{what} in a group of {self._ranks} ranks (rank {self._rank})"
        return Patience(name, limit, self._members, self._peers)

    def limit_waits(self, timeout: timedelta) -> None:
        """How long waits that begin from now on may take."""
        self._timeout = timeout

    def getBackendName(self) -> str:
        """As registered."""
        return BACKEND

    # torch keeps these with a group's built-in backends, of which there is none here.

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def setGroupName(self, name: str) -> None:
        """Torch's name of the group."""
        self._name = name

    def getGroupName(self) -> str:
        """As set."""
        return self._name

    def setGroupDesc(self, description: str) -> None:
        """What the group is for."""
        self._description = description

    def getGroupDesc(self) -> str:
        """As set."""
        return self._description

    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)

    def shutdown(self) -> None:
        """Completes what is under way and gives the communicator back; MPI has some 2000.

        Not after a wait that failed: what is under way then never completes.
        """
        if self._closed or self.failed:
            return
        for work in tuple(self.pending):
            work.wait()
        self._closed = True
        self._comm.Free()

    def abort(self) -> None:
        """Waits for nothing: the process is about to end."""
        self._closed = True

    def _joined(self, works: list[MpiWork], results: list[Tensor]) -> MpiWork:
        def finish() -> None:
            for work in works:
                work.wait()

        return self._work([], results, "a coalesced collective", finish)

    def _work(
        self,
        requests: Sequence[Any],
        results: list[Tensor],
        what: str,
        finish: Callable[[], None] | None = None,
        keep: object = None,
        status: MPI.Status | None = None,
    ) -> MpiWork:
        return MpiWork(self, requests, results, what, finish, keep, status)
