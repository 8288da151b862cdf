"""Which of the other ranks' processes still run: MPI itself waits for a dead rank for ever."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI


class Peers:
    """The processes of all ranks, watched through file descriptors of theirs (pidfd_open(2)).

    Where a rank cannot be watched (an old kernel, a container of its own), it counts as running.

    Args:
        world: of all ranks; they exchange their process ids over it.
    """

    def __init__(self, world: MPI.Intracomm) -> None:
        namespace = _namespace()
        self._watched: dict[int, int] = {}
        for rank, (process, its_namespace) in enumerate(world.allgather((os.getpid(), namespace))):
            if rank == world.rank or its_namespace != namespace:
                continue
            try:
                self._watched[rank] = os.pidfd_open(process)
            except (AttributeError, OSError):
                continue

    def ended(self, ranks: Iterable[int]) -> int | None:
        """The first of these ranks (of the world) whose process has ended, None while all run."""
        poll = select.poll()
        by_descriptor = {self._watched[r]: r for r in ranks if r in self._watched}
        for descriptor in by_descriptor:
            poll.register(descriptor, select.POLLIN)
        found = sorted(by_descriptor[descriptor] for descriptor, _ in poll.poll(0))
        return found[0] if found else None


def _namespace() -> str:
    """Process ids mean the same to processes for which this is the same."""
    try:
        return os.readlink(Path("/proc/self/ns/pid"))
    except OSError:
        return ""
