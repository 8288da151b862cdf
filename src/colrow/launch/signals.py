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
    _start_resource_tracker()  # which unblocks the signal when it has to start
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
    """What handles :data:`HANDLED` before also does afterwards, in the main thread.

    torch's agent leaves handlers of its own behind, MPICH's library one that lets a hangup pass.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that Python did not install cannot be put back by it
                signal.signal(number, handler)


def _start_resource_tracker() -> None:
    """multiprocessing's process that removes what others leave behind.

    It ignores SIGINT and SIGTERM, and here also what else a terminal sends to all of its processes:
    it has to outlive those that it tidies up after, which would start it again and complain.
    """
    with handlers_kept():
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
        resource_tracker.ensure_running()
