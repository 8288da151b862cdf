"""How far a run is, as one line of a terminal."""

from __future__ import annotations

import sys
from shutil import get_terminal_size
from typing import TextIO

from colrow.progress import ERASE

_SMOOTHING = 0.1  # weight of the newest step in times and speeds
_WIDEST = 30


class Bar:
    """A line that is written again after each step; silent where the stream is no terminal.

    Args:
        steps: of the whole run.
        stream: standard error by default.
    """

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self.shown = self._stream.isatty()
        self._steps, self._line = steps, ""
        self._step_seconds = self._tokens = 0.0

    def advance(
        self, step: int, *, loss: float, rate: float, tokens: int, seconds: float, memory: int
    ) -> None:
        """Takes one step's numbers: its tokens and seconds, the learning rate, bytes of memory."""
        if not self.shown:
            return
        new = _SMOOTHING if self._step_seconds else 1.0
        self._step_seconds += new * (seconds - self._step_seconds)
        self._tokens += new * (tokens - self._tokens)
        left = (self._steps - step) * self._step_seconds
        start = f"step {step}/{self._steps} "
        end = (
            f" loss {loss:.4f} lr {rate:.1e} {self._tokens / self._step_seconds:,.0f} tok/s "
            f"{memory / 1e9:.2f} GB ETA {_clock(left)}"
        )
        columns = get_terminal_size().columns - 1
        width = min(_WIDEST, columns - len(start) - len(end))
        done = width * step // self._steps
        bar = "━" * done + "─" * (width - done)
        self._line = f"{start}{bar}{end}"[:columns]
        self._write(self._line)

    def say(self, text: str) -> None:
        """A line above this one, on any stream."""
        if not self.shown:
            print(text, file=self._stream, flush=True)
            return
        self._write(f"{text}\n{self._line}")

    def close(self) -> None:
        """Leaves the last line where it is."""
        if self.shown and self._line:
            self._write(f"{self._line}\n")
            self._line = ""

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(ERASE + text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
