"""Runs test functions on several ranks: in a pool that is started once, or in fresh processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests import devices, forked

POOL_SIZE = 4
_SECONDS_TO_START = 120
_SECONDS_TO_END = 10
# How long the others may go on after a rank raised, before they count as waiting for it.
_SECONDS_TO_FOLLOW = 2.0


@dataclass(frozen=True)
class _Raised:
    """A rank's exception, as text: exceptions need not survive pickling."""

    type_name: str
    message: str
    traceback: str


class RankError(AssertionError):
    """A function raised on at least one rank, or did not end; shows every rank's traceback.

    Attributes:
        errors: by rank, "ValueError: what it said"; ranks without an exception are not in it.
    """

    def __init__(self, what: str, raised: dict[int, _Raised]) -> None:
        self.errors = {r: f"{e.type_name}: {e.message}" for r, e in sorted(raised.items())}
        parts = [what]
        parts += [f"--- rank {rank} ---\n{e.traceback}" for rank, e in sorted(raised.items())]
        super().__init__("\n".join(parts))


class RankPool:
    """Worker processes that keep their process groups from test to test.

    Args:
        device: where they compute, see :mod:`tests.devices`: their functions' tensors are made
            there where no device is named.
        size: how many, and so the most ranks of a call.
    """

    def __init__(self, device: devices.Device = "cpu", size: int = POOL_SIZE) -> None:
        self.device: devices.Device = device
        self._size = size
        self._connections: list[Connection] = []
        self._context: Any = None
        self._directory = ""
        # A process that has used CUDA, if only to count the GPUs, must not be forked.
        self._method = "spawn" if device == "cuda" else "forkserver"

    def __call__(
        self, n: int, function: Callable[..., Any], *args: Any, timeout: float = 60
    ) -> list[Any]:
        """``function(tp, *args)`` on ``n`` ranks; the results by rank.

        Args:
            n: 1 to ``size`` ranks.
            function: at the top level of a module, and given ``tp``, the
                :class:`colrow.comm.group.ParallelGroup` of the n ranks. Each call starts with
                ``torch.manual_seed(0)`` and fp32 as the default dtype.
            timeout: seconds after which the ranks count as hanging.

        Raises:
            RankError: with the tracebacks. Unless all ranks raised the same ValueError or
                TypeError, which says that nothing is left half-sent, the pool starts anew.
        """
        if not 1 <= n <= self._size:
            raise ValueError(f"the pool runs 1 to {self._size} ranks, not {n}")
        task = pickle.dumps((n, function, args))  # here, where a failure names the argument
        self._start()
        for connection in self._connections[:n]:
            connection.send_bytes(task)
        results, raised, lost = self._collect(n, timeout)
        if not raised and not lost:
            return [results[rank] for rank in range(n)]
        same = {(e.type_name, e.message) for e in raised.values()}
        if not (
            len(raised) == n and len(same) == 1 and same.pop()[0] in ("ValueError", "TypeError")
        ):
            self.stop()
        what = f"{function.__qualname__} failed on ranks {sorted(raised)} of {n}"
        if lost:
            what += f"; {lost}"
        raise RankError(what, raised)

    def _collect(self, n: int, timeout: float) -> tuple[dict[int, Any], dict[int, _Raised], str]:
        results: dict[int, Any] = {}
        raised: dict[int, _Raised] = {}
        waiting = {connection: rank for rank, connection in enumerate(self._connections[:n])}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                ranks = sorted(waiting.values())
                why = "waiting for them" if raised else f"not done after {timeout:g} s"
                return results, raised, f"ranks {ranks} were {why} and were killed"
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answer = pickle.loads(connection.recv_bytes())
                except EOFError:
                    process = self._context.processes[rank]
                    process.join(5)
                    return results, raised, f"rank {rank} died with exit code {process.exitcode}"
                if isinstance(answer, _Raised):
                    raised[rank] = answer
                    deadline = min(deadline, time.monotonic() + _SECONDS_TO_FOLLOW)
                else:
                    results[rank] = answer
        return results, raised, ""

    def _start(self) -> None:
        if self._connections:
            return
        from torch.multiprocessing.spawn import start_processes

        from colrow.launch.environment import (
            inherited_environment,  # the same care for OMP_NUM_THREADS
        )

        self._directory = tempfile.mkdtemp(prefix="colrow-tests-")
        pipes = [multiprocessing.Pipe() for _ in range(self._size)]
        if self._method == "forkserver":
            forked.start_server()
        with inherited_environment({"OMP_NUM_THREADS": "1"}):
            self._context = start_processes(  # type: ignore[no-untyped-call]
                _work,
                (
                    [theirs for _, theirs in pipes],
                    os.path.join(self._directory, "store"),
                    self.device,
                ),
                nprocs=self._size,
                join=False,
                daemon=True,
                start_method=self._method,
            )
        for _, theirs in pipes:
            theirs.close()  # so that a worker's death is an end of file here
        self._connections = [ours for ours, _ in pipes]
        _, raised, lost = self._collect(self._size, _SECONDS_TO_START)
        if raised or lost:
            self.stop()
            raise RankError(f"the pool did not start: {lost}", raised)

    def renew(self) -> None:
        """Ends workers that are cheap to start: process groups and caches that tests have left in
        them would slow later ones down, by half and more.
        """
        if self._method == "forkserver":
            self.close()

    def close(self) -> None:
        """Lets the workers end by themselves, as a measurement of coverage needs."""
        for connection in self._connections:
            connection.close()
        if self._context is not None:
            for process in self._context.processes:
                process.join(_SECONDS_TO_END)
        self.stop()

    def stop(self) -> None:
        """Ends the workers; the next call starts new ones."""
        if self._context is None:
            return
        for process in self._context.processes:
            process.kill()
        for process in self._context.processes:
            process.join()
        for connection in self._connections:
            connection.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._connections, self._context = [], None


def run_world(n: int, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """``function(*args)`` on n fresh ranks, for what needs ``init_mesh`` itself.

    Costs a second or two for each call. One rank too gets a process of its own.
    """
    from colrow.launch.agent import run_ranks

    return run_ranks(
        function,
        args,
        ranks=n,
        threads="1",
        max_restarts=0,
        timeout_seconds=timeout,
        quiet=True,
    )


def _work(rank: int, connections: list[Connection], store: str, device: devices.Device) -> None:
    """A worker's life: joins the groups, then answers tasks until the pool goes away."""
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    from colrow.launch.rendezvous import stay_on_loopback

    for other, connection in enumerate(connections):
        if other != rank:
            connection.close()
    connection, size = connections[rank], len(connections)
    for category in (DeprecationWarning, FutureWarning):  # as in pyproject.toml
        warnings.filterwarnings("error", category=category, module=r"(colrow|tests)\b")
    stay_on_loopback()
    dist.init_process_group("gloo", store=FileStore(store, size), rank=rank, world_size=size)
    groups = {
        n: dist.new_group(list(range(n)), backend=devices.backend(device, n))
        for n in range(2, size + 1)
    }
    devices.enter(device, rank)
    connection.send_bytes(pickle.dumps(None))
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        try:
            from colrow.comm.group import ParallelGroup

            n, function, args = pickle.loads(task)
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float32)
            tp = ParallelGroup(groups.get(n), rank, n)
            answer = devices.dumps(function(tp, *devices.moved(args)))
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            answer = pickle.dumps(_Raised(type(error).__name__, str(error), text))
        connection.send_bytes(answer)


def child_ranks(parent: int) -> list[int]:
    """Process ids of the ranks that a command started, in their order (Linux)."""
    found = []
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if b"spawn_main" in command:
            found.append(int(pid))
    return sorted(found)
