"""Finds ranks whose process was stopped for too long, and tells the terminal who waits for whom."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from colrow.launch.failure import Evidence
from colrow.launch.places import Place, stopped, waited_for

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_UNTIL_SAID = 30.0


class HangDetector:
    """Looks at the processes of the ranks from time to time.

    Args:
        limit_seconds: how long the process of a rank may be stopped; None for as long as it is.
    """

    def __init__(self, limit_seconds: float | None) -> None:
        self._limit = limit_seconds
        self._looked_at = time.monotonic()
        self._stopped_seconds: dict[int, float] = {}
        self._said: set[int] = set()

    def found(self, running: dict[int, int], evidence: Evidence) -> bool:
        """Whether a process was stopped for too long; ``evidence`` then says whose.

        Args:
            running: ids of the processes that run, by rank.
        """
        limit, now = self._limit, time.monotonic()
        elapsed = now - self._looked_at
        if limit is None or elapsed < _SECONDS_BETWEEN_LOOKS:
            return False
        self._looked_at = now
        halted = [rank for rank, process in running.items() if stopped(process)]
        # At most a look's time: the terminal may have stopped this process too.
        elapsed = min(elapsed, 2 * _SECONDS_BETWEEN_LOOKS)
        seconds = {rank: self._stopped_seconds.get(rank, 0.0) + elapsed for rank in halted}
        self._stopped_seconds = seconds
        longest = max(seconds.values(), default=0.0)
        places = evidence.read_places()
        until_said = min(_SECONDS_UNTIL_SAID, limit / 2)
        waiting = {
            rank: place
            for rank, place in places.items()
            if place and place.waiting_in and now - place.since > until_said and rank in running
        }
        if waiting or longest > until_said:
            self._say(waited_for(running, places), waiting, until_said)
        else:
            self._said.clear()
        if longest <= limit:
            return False
        evidence.hung, evidence.hung_seconds = waited_for(running, places), longest
        evidence.places = places
        return True

    def _say(self, ranks: dict[int, str], waiting: Mapping[int, Place], seconds: float) -> None:
        for rank, state in ranks.items():
            if rank not in self._said:
                line = f"... rank {rank} is waited for since {seconds:.0f} s: {state}"
                for other in sorted(waiting.keys() - ranks.keys()):
                    place = waiting[other]
                    line += f"; rank {other} waits in {place.waiting_in}"
                    break
                print(line, file=sys.stderr, flush=True)
                self._said.add(rank)
