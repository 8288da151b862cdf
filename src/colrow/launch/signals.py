"""Ctrl-C at the wrong moment: while a process starts, where Python would print a traceback."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """Processes started inside import torch first; an interrupt waits until they say otherwise."""
    resource_tracker.ensure_running()  # which unblocks the signal when it has to start
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_on_sigint() -> None:
    """In a process that was started so, and has nothing to tidy up: an interrupt just ends it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
