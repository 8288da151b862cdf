"""A collective under way: waiting for it, and futures of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.comm.mpi.patience import NAP_SECONDS, Patience

if TYPE_CHECKING:
    from mpi4py import MPI

_SPINS = 100  # about 30 microseconds: then the other rank may need this very core
# How long a future is waited for before a thread takes it over.
_FUTURE_SECONDS = 0.005

Results = list[Tensor]


def completed(requests: Sequence[MPI.Request], status: MPI.Status | None = None) -> bool:
    """Whether all complete while this spins for them."""
    for request in requests:
        test = request.Test
        for _ in range(_SPINS):
            if test(status):
                break
        else:
            return False
    return True


class Issuer(Protocol):
    """What a work needs of the group that issued it.

    Attributes:
        pending: works that are not complete.
        failed: a wait ended without its result.
    """

    pending: set[MpiWork]
    failed: bool

    def keep(self, work: MpiWork) -> None:
        """Holds a work until it is complete."""
        ...

    def patience(self, what: str, timeout: timedelta | None) -> Patience:
        """For a wait; ``timeout``, if given and positive, in place of the group's own."""
        ...


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
        group: Issuer,
        requests: Sequence[MPI.Request],
        results: Results,
        what: str,
        finish: Callable[[], None] | None,
        keep: object,
        status: MPI.Status | None,
    ) -> None:
        super().__init__()
        self._group, self._requests, self._results = group, requests, results
        self._what, self._finish, self._keep = what, finish, keep
        self._status = status
        self._future: torch.futures.Future[Results] | None = None
        self.done = False
        group.keep(self)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks until the results are there.

        Raises:
            RuntimeError: when the time limit passed or a rank ended, naming what was waited for.
        """
        if self._future is not None:
            self._future.wait()
        elif not self.done:
            if not completed(self._requests, self._status):
                self._wait_patiently(timeout)
            self._end()
        return True

    def is_completed(self) -> bool:
        """Whether the results are there; drives MPI."""
        if self._future is None and not self.done and self._test():
            self._end()
        return self.done

    def result(self) -> Results:
        """The tensors; they are complete after :meth:`wait`."""
        return self._results

    def get_future(self) -> torch.futures.Future[Results]:
        """A future of the results.

        MPI makes progress only where somebody waits, and nobody can wait for MPI in a future. So it
        is waited for here, for a moment: DDP's ranks ask at the same time. Whoever comes late is
        left to a thread, since this rank may have to do something else first.
        """
        if self._future is None:
            future: torch.futures.Future[Results] = torch.futures.Future()
            until = time.monotonic() + _FUTURE_SECONDS
            while not self.is_completed():
                if time.monotonic() > until:
                    self._future = future
                    _futures.add(self, self._group.patience(self._what, None))
                    return future
            future.set_result(self._results)
            self._future = future
        return self._future

    def complete_future(self, patience: Patience) -> bool:
        """Whether the future has its result, or the reason why there is none, by now.

        For the thread that took it over; this one leaves the requests to it.
        """
        assert self._future is not None
        try:
            if not self._test():
                patience.check()
                return False
            self._end()
            self._future.set_result(self._results)
        except Exception as error:  # whoever waits for the future raises it
            self._group.failed = True
            self._future.set_exception(error)  # type: ignore[arg-type]
        return True

    def _source_rank(self) -> int:
        return -1 if self._status is None else self._status.Get_source()

    def _test(self) -> bool:
        for request in self._requests:  # noqa: SIM110  (polled: cheaper)
            if not request.Test(self._status):
                return False
        return True

    def _wait_patiently(self, timeout: timedelta | None) -> None:
        patience = self._group.patience(self._what, timeout)
        try:
            while not self._test():
                patience.pause()
        except RuntimeError:
            self._group.failed = True
            raise

    def _end(self) -> None:
        self.done = True
        if self._finish is not None:
            self._finish()
        self._finish = self._keep = None
        self._group.pending.discard(self)


class _Futures:
    """A thread that completes works whose futures are held; it runs while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[tuple[MpiWork, Patience]] = []
        self._running = False

    def add(self, work: MpiWork, patience: Patience) -> None:
        with self._lock:
            self._open.append((work, patience))
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="colrow-mpi-futures", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._open:
                    self._running = False
                    return
                works = list(self._open)
            for entry in works:
                work, patience = entry
                if work.complete_future(patience):
                    with self._lock:
                        self._open.remove(entry)
            time.sleep(NAP_SECONDS)


_futures = _Futures()
