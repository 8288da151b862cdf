"""A collective under way: waiting without burning a core, time limits, futures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from mpi4py import MPI

    from colrow.comm.mpi.group import MpiGroup

_SPINS = 100  # about 30 microseconds: then the other rank may need this very core
_YIELD_SECONDS = 0.05
_NAP_SECONDS = 0.0002


class MpiWork(dist.Work):
    """Requests of MPI, and what is left to do when they are complete.

    Args:
        group: issued it; has the time limit, and keeps the work until it is complete.
        requests: to be waited for.
        results: the tensors that the caller gets.
        what: for the message of the time limit.
        finish: called once all are complete, such as copying out of a buffer.
        keep: buffers that MPI reads or writes until then.
        status: filled in by MPI, when the source of a message is asked for.
    """

    def __init__(
        self,
        group: MpiGroup,
        requests: Sequence[MPI.Request],
        results: list[Tensor],
        what: str,
        finish: Callable[[], None] | None,
        keep: object,
        status: MPI.Status | None,
    ) -> None:
        super().__init__()
        self._group, self._requests, self._results = group, requests, results
        self._what, self._finish, self._keep = what, finish, keep
        self._status = status
        self.done = False
        group.pending.add(self)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks until the results are there.

        Raises:
            RuntimeError: when the time limit passed, naming what was waited for.
        """
        if not self.done:
            for request in self._requests:
                self._complete(request, timeout)
            self._end()
        return True

    def is_completed(self) -> bool:
        """Whether the results are there; drives MPI."""
        if not self.done and all(request.Test(self._status) for request in self._requests):
            self._end()
        return self.done

    def result(self) -> list[Tensor]:
        """The tensors; they are complete after :meth:`wait`."""
        return self._results

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """A completed future of the results: MPI makes progress only where somebody waits."""
        self.wait()
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result(self._results)
        return future

    def _source_rank(self) -> int:
        return -1 if self._status is None else self._status.Get_source()

    def _complete(self, request: MPI.Request, timeout: timedelta | None) -> None:
        test, status = request.Test, self._status
        for _ in range(_SPINS):
            if test(status):
                return
        limit = timeout if timeout is not None and timeout.total_seconds() > 0 else None
        seconds = (limit or self._group.timeout).total_seconds()
        started = time.monotonic()
        while not test(status):
            # The other rank is late: leave the core to whoever has work.
            waited = time.monotonic() - started
            if waited < _YIELD_SECONDS:
                os.sched_yield()
            else:
                time.sleep(_NAP_SECONDS)
            if waited > seconds:
                raise RuntimeError(
                    f"{self._group.describe(self._what)} timed out after {waited:.0f} s: another "
                    "rank is stuck, has ended, or does not take part (all ranks of a group must "
                    "issue the same collectives in the same order)"
                )

    def _end(self) -> None:
        self.done = True
        if self._finish is not None:
            self._finish()
        self._finish = self._keep = None
        self._group.pending.discard(self)
