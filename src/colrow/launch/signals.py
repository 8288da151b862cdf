"""Signals of a launcher, and Ctrl-C while a process starts, where Python prints a traceback."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

# What a launcher hands on to its ranks.
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


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


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Restores the handlers of :data:`HANDLED`: torch's agent leaves its own behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
