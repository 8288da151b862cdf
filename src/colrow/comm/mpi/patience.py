"""How long to wait, and how: soon without burning a core, and never for what cannot come."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta

from colrow.comm.mpi.peers import Peers

_YIELD_SECONDS = 0.05
NAP_SECONDS = 0.0002
# Between two looks at the other ranks' processes.
_LOOK_SECONDS = 0.5
# A longer pause means that this process was stopped itself, with all others, by a terminal or a
# debugger: that time does not count.
_STOPPED_SECONDS = 5.0
# What a rank sent before it ended can still arrive.
_GRACE_SECONDS = 1.0


class Patience:
    """One wait: pauses between two looks at MPI, and gives up with a message.

    Args:
        what: is waited for, such as "all_reduce in a group of 2 ranks (rank 0)".
        limit: after which to give up.
        ranks: of the world, whose processes must run for it to happen.
        peers: who watches them.
    """

    def __init__(self, what: str, limit: timedelta, ranks: Sequence[int], peers: Peers) -> None:
        self._what, self._limit = what, limit.total_seconds()
        self._ranks, self._peers = ranks, peers
        self._started = self._looked = self._checked = time.monotonic()
        self._ended: int | None = None

    def pause(self) -> None:
        """Leaves the core to whoever has work: at first briefly, checking nothing.

        Raises:
            RuntimeError: as :meth:`check`.
        """
        if time.monotonic() - self._started < _YIELD_SECONDS:
            os.sched_yield()
            return
        time.sleep(NAP_SECONDS)
        self.check()

    def check(self) -> None:
        """Raises RuntimeError when the time is over or a rank that must take part has ended."""
        now = time.monotonic()
        if now - self._checked > _STOPPED_SECONDS:
            self._started += now - self._checked
        self._checked = now
        waited = now - self._started
        if waited > self._limit:
            raise RuntimeError(
                f"{self._what} timed out after {waited:.0f} s: another rank is stuck, or does not "
                "take part (all ranks of a group must issue the same collectives in the same order)"
            )
        if self._ended is None:
            if now - self._looked > _LOOK_SECONDS:
                self._looked = now
                self._ended = self._peers.ended(self._ranks)
        elif now - self._looked > _GRACE_SECONDS:
            raise RuntimeError(
                f"{self._what} cannot complete: the process of rank {self._ended} has ended"
            )
