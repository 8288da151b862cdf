"""What a rank is doing, told by a thread of its process, for the launcher that watches it.

A rank that hangs cannot say so, and the ranks that wait for it know only what they wait in. Each
rank that colrow starts writes where its main thread is into a small file, every few seconds. From
these files and the state of the processes the launcher tells who waits for whom.

Importing this module does not import torch.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

SECONDS_BETWEEN_LOOKS = 1.0
# A thread that has not written for so long does not get to run: its process is stopped, blocked in
# the kernel, or in code that keeps the interpreter's lock.
_SECONDS_UNTIL_SILENT = 6.0
_ITS_START = "its start"  # the first look, which the main thread takes itself
_MPI = f"colrow{os.sep}comm{os.sep}mpi{os.sep}"
_WAITING = (f"torch{os.sep}distributed{os.sep}", f"colrow{os.sep}comm{os.sep}")
_LIBRARY = str(Path(threading.__file__).parent)
_moved = 0


def moved() -> None:
    """Says that this rank got on; where it stands then counts as reached just now."""
    global _moved
    _moved += 1


@dataclass(frozen=True)
class Place:
    """Where the main thread of a rank is.

    Attributes:
        waiting_in: the collective or message that it waits in, such as "all_reduce", or "".
        line: "file.py, line 12, in forward".
        since, seen: when it came there and when it was last seen there, as time.monotonic().
    """

    waiting_in: str
    line: str
    since: float
    seen: float


class PlaceReporter(threading.Thread):
    """The thread, which ends with its process.

    Args:
        file: is replaced at every look.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(name="colrow-places", daemon=True)
        self._file, self._main = file, threading.main_thread().ident
        self._last: tuple[object, ...] = ()
        self._since = time.monotonic()

    def run(self) -> None:
        """Looks from time to time whether this rank gets on."""
        while True:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            try:
                self.look()
            except OSError:  # the launcher is gone, or its disk is full: there is nobody to tell
                return

    def look(self) -> None:
        """Writes where the main thread is."""
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return
        place = (_moved, *_position(frame))
        now = time.monotonic()
        if place != self._last:
            self._last, self._since = place, now
        starting = threading.get_ident() == self._main
        line = _ITS_START if starting else _line(frame)
        text = json.dumps(asdict(Place(_waiting_in(frame), line, self._since, now)))
        part = self._file.with_suffix(".part")
        part.write_text(text)
        part.replace(self._file)


def read_place(file: Path) -> Place | None:
    """What a rank wrote last; None when it did not come to it."""
    try:
        return Place(**json.loads(file.read_text()))
    except (OSError, ValueError):
        return None


def stopped(process: int) -> bool:
    """Whether a process is stopped by a signal (SIGSTOP, SIGTSTP); False where that is unknown."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[:1] == ["T"]


def waited_for(processes: Mapping[int, int], places: Mapping[int, Place | None]) -> dict[int, str]:
    """The ranks that the others wait for, and what each is doing instead.

    Args:
        processes: ids of the processes that run, by rank.
        places: where each said that it is.

    Returns:
        Of these ranks those that wait for nobody, the stopped ones alone where there are any. Empty
        when all wait.
    """
    states: dict[int, str] = {}
    for rank, process in processes.items():
        if stopped(process):
            states[rank] = "it is stopped by a signal such as SIGSTOP"
    if states:
        return states
    now = time.monotonic()
    for rank in processes:
        place = places.get(rank)
        silent = 0.0 if place is None else now - place.seen
        started = place is not None and place.line == _ITS_START
        if place is None or (started and silent < 2 * SECONDS_BETWEEN_LOOKS):
            states[rank] = "it is still starting"
        elif started or silent > _SECONDS_UNTIL_SILENT:
            states[rank] = f"its interpreter has not run for {silent:.0f} s, since {place.line}"
        elif not place.waiting_in:
            states[rank] = f"it is at {place.line}"
    return states


def _position(frame: FrameType | None) -> list[tuple[int, int]]:
    """All frames, without those of MPI's waits, which are a loop."""
    found: list[tuple[int, int]] = []
    while frame is not None:
        if not found and _MPI in frame.f_code.co_filename:
            frame = frame.f_back
            continue
        found.append((id(frame), frame.f_lasti))
        frame = frame.f_back
    return found


def _waiting_in(frame: FrameType | None) -> str:
    """The function of torch.distributed or colrow.comm that the innermost frame belongs to."""
    name = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not any(part in file for part in _WAITING):
            break
        own = frame.f_code.co_name
        if _MPI not in file and not own.startswith("_") and own not in ("wrapper", "wait"):
            return own
        name = "a collective"
        frame = frame.f_back
    return name


def _line(frame: FrameType) -> str:
    """The innermost line that is not the standard library's."""
    place = frame
    while _LIBRARY in place.f_code.co_filename and "site-packages" not in place.f_code.co_filename:
        if place.f_back is None:
            place = frame
            break
        place = place.f_back
    code = place.f_code
    return f"{Path(code.co_filename).name}, line {place.f_lineno}, in {code.co_name}"
