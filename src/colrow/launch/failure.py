"""Which rank failed first, and why: what the launcher saw and what the ranks said.

Everything is gathered before the launcher stops the ranks that are left, so that what it does to
them is not taken for the cause.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colrow.launch.errors import RankFailure
from colrow.launch.places import Place, read_place, waited_for

# How long the ranks that did not fail first may take to say what happened to them.
_SECONDS_AFTER_A_TIMEOUT = 1.5
_SECONDS_AFTER_A_LOST_PEER = 5.0


@dataclass
class Evidence:
    """What is known about the ranks of one attempt.

    Attributes:
        directory: where the ranks write their errors and places.
        processes: ids, by rank.
        exit_codes: of the ranks that have ended, before any was stopped; None for the others.
        hung: the ranks that the others waited for in vain, and what each was doing.
        hung_seconds: for how long.
        places: where the ranks were then.
        oom_kills: of the kernel, when the ranks started.
        started_at: as time.monotonic(), when the first rank that failed was noticed.
    """

    directory: Path
    processes: dict[int, int]
    exit_codes: dict[int, int | None] = field(default_factory=dict)
    hung: dict[int, str] = field(default_factory=dict)
    hung_seconds: float = 0.0
    places: dict[int, Place | None] = field(default_factory=dict)
    started_at: float | None = None
    oom_kills: int = field(default_factory=lambda: _oom_kills())

    def complete(self, exit_codes: Mapping[int, int | None]) -> bool:
        """Takes the exit codes of now; whether the cause can be told by now.

        It can when a rank failed by itself. When ranks only lost or waited for another, that one
        gets a moment to end; after it, a rank that still runs is one that hangs.
        """
        self.exit_codes = dict(exit_codes)
        now = time.monotonic()
        if self.started_at is None:
            self.started_at, self.places = now, self.read_places()
        errors, places = self.errors(), self.places
        failed = [rank for rank, code in exit_codes.items() if code is not None]
        if any(
            not (errors[r]["lost_peer"] if r in errors else _aborted(exit_codes[r], places.get(r)))
            for r in failed
        ):
            return True
        running = {r: p for r, p in self.processes.items() if exit_codes.get(r) is None}
        if not running:
            return True
        timed_out = all(e["timed_out"] for e in errors.values())
        patience = _SECONDS_AFTER_A_TIMEOUT if timed_out else _SECONDS_AFTER_A_LOST_PEER
        if now - self.started_at < patience:
            return False
        if timed_out:
            self.hung = waited_for(running, self.read_places())
            waits = [p for r, p in places.items() if r not in running and p is not None]
            self.hung_seconds = max((self.started_at - p.since for p in waits), default=0.0)
        return True

    def out_of_memory(self) -> bool:
        """Whether the kernel killed a process for want of memory since the ranks started."""
        return _oom_kills() > self.oom_kills

    def errors(self) -> dict[int, dict[str, Any]]:
        """What ranks raised."""
        found = {}
        for rank in self.processes:
            path = self.directory / f"rank-{rank}.json"
            if path.exists():
                found[rank] = json.loads(path.read_text())
        return found

    def read_places(self) -> dict[int, Place | None]:
        """Where ranks were last."""
        return {rank: read_place(self.directory / f"rank-{rank}.place") for rank in self.processes}


def root_cause(evidence: Evidence) -> RankFailure:
    """The failure that the others follow from.

    First the earliest exception that is not a lost connection, then a process that died without
    one, then a rank that hung, then the earliest lost connection.
    """
    errors, places, codes = evidence.errors(), evidence.places, evidence.exit_codes
    own = [rank for rank, error in errors.items() if not error["lost_peer"]]
    died = [
        rank
        for rank, code in sorted(codes.items())
        if rank not in errors and code is not None and not _aborted(code, places.get(rank))
    ]
    if not own and not died and evidence.hung:
        return _hung(evidence, places)
    if died and not own:
        return _died(died[0], codes[died[0]], evidence.out_of_memory())
    if not errors:
        rank = min((r for r, code in codes.items() if code is not None), default=0)
        return RankFailure(rank, codes.get(rank))
    rank = min(own or errors, key=lambda r: errors[r]["time_ns"])
    fields = ("error_type", "message", "traceback", "bad_input")
    return RankFailure(rank, codes.get(rank), **{name: errors[rank][name] for name in fields})


def _died(rank: int, code: int | None, out_of_memory: bool) -> RankFailure:
    why = ""
    if code == -signal.SIGKILL and out_of_memory:
        why = "rank {} was killed by SIGKILL: the kernel had no memory left; use smaller batches, "
        why += "shorter sequences or more devices"
    elif code == -signal.SIGBUS:
        why = "rank {} was killed by SIGBUS: a file that it maps was cut short, or its file system "
        why += "is full, such as /dev/shm (in a container: --shm-size)"
    return RankFailure(rank, code, message=why.format(rank))


def _oom_kills() -> int:
    """How many processes the kernel has killed for want of memory, since it started."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _hung(evidence: Evidence, places: Mapping[int, Place | None]) -> RankFailure:
    rank, state = next(iter(sorted(evidence.hung.items())))
    message = f"rank {rank} did not respond"
    if evidence.hung_seconds >= 1:
        message += f" for {evidence.hung_seconds:.0f} s"
    message += f": {state}"
    for other, place in sorted(places.items()):
        if other not in evidence.hung and place is not None and place.waiting_in:
            message += f"; rank {other} waited in {place.waiting_in}"
            break
    for other, error in sorted(evidence.errors().items()):
        said = " ".join(error["message"].split())
        message += f"; rank {other} failed: {error['error_type']}: {said}"
        break
    return RankFailure(rank, None, message=message)


def _aborted(code: int | None, place: Place | None) -> bool:
    """Whether NCCL's watchdog ended this process, which waited for another rank."""
    return code == -signal.SIGABRT and place is not None and bool(place.waiting_in)
