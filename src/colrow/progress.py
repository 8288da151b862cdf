"""What a person who waits at a terminal is told meanwhile. No torch."""

from __future__ import annotations

import sys
import threading
import time
from shutil import get_terminal_size
from types import TracebackType
from typing import TextIO

_SECONDS_BETWEEN = 0.5
ERASE = "\r\x1b[K"


class Progress:
    """One line on standard error that says what is being waited for, and for how long.

    It is written when the ``with`` block begins, again each half second, and erased in the end.
    Where standard error is no terminal nothing is written.

    Args:
        text: what is waited for.
        active: False is silent too, for ranks that have nothing to say.
        stream: instead of standard error.
    """

    def __init__(self, text: str, *, active: bool = True, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._active = active and self._stream.isatty()
        self._text, self._since = text, time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._again, daemon=True)

    def __enter__(self) -> Progress:
        if self._active:
            self._write()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def say(self, text: str) -> None:
        """What is waited for from now on."""
        self._text, self._since = text, time.monotonic()
        if self._active:
            self._write()

    def hand_over(self) -> None:
        """Leaves the line as it is, for another process to go on with."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def end(self) -> None:
        """Erases the line; more than once does no harm."""
        self.hand_over()
        if self._active:
            self._active = False
            self._stream.write(ERASE)
            self._stream.flush()

    def _again(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN):
            self._write()

    def _write(self) -> None:
        seconds = time.monotonic() - self._since
        waited = f" {seconds:.0f} s" if seconds >= 1 else ""
        room = get_terminal_size().columns - len("... ") - len(waited) - 1
        self._stream.write(f"{ERASE}... {self._text[:room]}{waited}")
        self._stream.flush()


def say(text: str) -> None:
    """One line on standard error, in place of a progress line that may stand there."""
    erase = ERASE if sys.stderr.isatty() else ""
    print(f"{erase}{text}", file=sys.stderr, flush=True)
