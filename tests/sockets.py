"""The network sockets of a process and of all that it started (Linux)."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from types import TracebackType

_TABLES = ("tcp", "tcp6", "udp", "udp6", "raw", "raw6")
_LOOPBACK = re.compile(
    r"[0-9A-F]{6}7F"  # 127.0.0.0/8, its bytes reversed
    r"|0{24}01000000"  # ::1
    r"|0{16}FFFF0000[0-9A-F]{6}7F"  # ::ffff:127.0.0.0/104
)


def descendants(pid: int) -> list[int]:
    """The process and all that it started."""
    found, front = [pid], [pid]
    while front:
        for children in Path(f"/proc/{front.pop()}/task").glob("*/children"):
            try:
                pids = [int(word) for word in children.read_text().split()]
            except OSError:
                continue
            found += pids
            front += pids
    return found


def open_sockets(pid: int) -> set[str]:
    """Local addresses, such as "tcp 0100007F:A4FA", of the sockets of these processes."""
    inodes = set()
    for process in descendants(pid):
        try:
            for descriptor in Path(f"/proc/{process}/fd").iterdir():
                inodes.add(os.readlink(descriptor))
        except OSError:  # it has ended, or closed the file meanwhile
            continue
    found = set()
    for table in _TABLES:
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in inodes:
                found.add(f"{table} {fields[1]}")
    return found


def beyond_loopback(sockets: set[str]) -> set[str]:
    """Those of these that others than this host could reach."""
    return {s for s in sockets if not _LOOPBACK.fullmatch(s.split()[1].partition(":")[0])}


class Watch:
    """Collects the sockets of a process and of all that it starts, while inside.

    Attributes:
        seen: local addresses, as :func:`open_sockets` gives them.
    """

    def __init__(self, pid: int) -> None:
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.seen: set[str] = set()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            self.seen |= open_sockets(self._pid)
            time.sleep(0.1)
