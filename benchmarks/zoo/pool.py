"""Ranks that are started once and answer many tasks, each within a time limit.

Workers are forked from a server process that has imported torch and transformers, so that those
which a task left broken are replaced in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from colrow.launch.signals import end_on_sigint, sigint_blocked
from colrow.leftovers import scratch_directory

_SECONDS_TO_START = 120.0
# Process groups that a task makes (transformers' meshes) leave Gloo's threads behind, several each.
_TASKS_PER_LIFE = 8
# How long the other ranks may go on after one raised, before they count as waiting for it.
_SECONDS_TO_FOLLOW = 2.0
_PRELOADED = [
    "torch.distributed",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.generation.utils",
    "colrow.verification.in_place",
]


@dataclass(frozen=True)
class Raised:
    """An exception of a rank, as text."""

    rank: int
    type_name: str
    message: str
    traceback: str


class TaskFailure(RuntimeError):
    """A task that did not end well on all ranks.

    Attributes:
        raised: what the first rank said that raised; None when none did.
        on_all_ranks: whether all raised.
    """

    def __init__(
        self, message: str, raised: Raised | None = None, *, on_all_ranks: bool = False
    ) -> None:
        super().__init__(message)
        self.raised, self.on_all_ranks = raised, on_all_ranks


class Workers:
    """``ranks`` processes that form one process group (Gloo, on loopback).

    Args:
        ranks: how many.
        tasks_per_life: after so many tasks they are replaced.

    Use as a context manager. A task that fails on some ranks or takes too long ends the workers;
    the next one gets new ones.
    """

    def __init__(self, ranks: int, tasks_per_life: int = _TASKS_PER_LIFE) -> None:
        self.ranks, self._tasks_per_life = ranks, tasks_per_life
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._directory, self._tasks = "", 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, function: Callable[..., Any], *args: object, timeout_seconds: float) -> Any:
        """``function(*args)`` on every rank; rank 0's result.

        Raises:
            TaskFailure: when a rank raised, died or did not end in time.
        """
        task = pickle.dumps((function, args))
        if self._tasks == self._tasks_per_life:
            self.stop()
        self._start()
        self._tasks += 1
        for connection in self._connections:
            connection.send_bytes(task)
        return self._collect(timeout_seconds)

    def _collect(self, timeout_seconds: float) -> Any:
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        result: Any = None
        raised: list[Raised] = []
        deadline = time.monotonic() + timeout_seconds
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                if raised:
                    raise TaskFailure(f"rank {raised[0].rank} failed alone", raised[0])
                raise TaskFailure(f"not done after {timeout_seconds:g} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answer = pickle.loads(connection.recv_bytes())
                except EOFError:
                    process = self._processes[rank]
                    process.join(5)
                    self.stop()
                    raise TaskFailure(f"rank {rank} died ({process.exitcode})") from None
                if isinstance(answer, Raised):
                    raised.append(answer)
                    deadline = min(deadline, time.monotonic() + _SECONDS_TO_FOLLOW)
                elif rank == 0:
                    result = answer
        if not raised:
            return result
        if len({(r.type_name, r.message) for r in raised}) > 1 or len(raised) < self.ranks:
            self.stop()  # ranks that parted may have left a collective half done
        first = min(raised, key=lambda r: (_lost_peer(r), r.rank))
        raise TaskFailure(
            f"{first.type_name}: {first.message}", first, on_all_ranks=len(raised) == self.ranks
        )

    def _start(self) -> None:
        if self._connections:
            return
        from colrow.launch.environment import inherited_environment

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._directory = str(scratch_directory("zoo"))
        store = os.path.join(self._directory, "store")
        pipes = [context.Pipe() for _ in range(self.ranks)]
        variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with inherited_environment(variables), sigint_blocked():
            for rank, (_, theirs) in enumerate(pipes):
                process = context.Process(
                    target=_work, args=(rank, self.ranks, theirs, store), daemon=True
                )
                process.start()
                self._processes.append(process)
                theirs.close()  # so that a worker's death is an end of file here
        self._connections = [ours for ours, _ in pipes]
        self._collect(_SECONDS_TO_START)

    def stop(self) -> None:
        """Ends the workers."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._processes, self._connections, self._directory = [], [], ""
        self._tasks = 0


def _lost_peer(raised: Raised) -> bool:
    return "gloo" in raised.message.lower() or "connection" in raised.message.lower()


def _work(rank: int, ranks: int, connection: Connection, store: str) -> None:
    """A worker's life: joins the group, then answers tasks until the pipe closes."""
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    from colrow.launch.rendezvous import stay_on_loopback

    end_on_sigint()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    stay_on_loopback()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(store, ranks), rank=rank, world_size=ranks)
    connection.send_bytes(pickle.dumps(None))
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, args = pickle.loads(task)
            answer = pickle.dumps(function(*args))
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            answer = pickle.dumps(Raised(rank, type(error).__name__, str(error), text))
        connection.send_bytes(answer)
