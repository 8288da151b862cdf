"""What went wrong on which rank, and what an exception says to a person. No torch."""

from __future__ import annotations

import os
import signal

# The exceptions that say that the user's input is wrong.
BAD_INPUT = (
    ValueError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


class RankFailure(RuntimeError):
    """A rank ended before its function returned; ``str()`` is one line that names the cause.

    Attributes:
        rank: the rank that failed first. A rank that only lost its connection to a dead one is
            not named while the dead one can be.
        exit_code: of its process; negative for a signal.
        signal_name: "SIGKILL", for one; None when no signal ended it.
        error_type: the name of the exception's class; None when there was no exception.
        message: the exception's whole message, or what happened to the process.
        traceback: the rank's traceback, "" without an exception.
        bad_input: the exception was one of BAD_INPUT: what the user gave is wrong.
    """

    def __init__(
        self,
        rank: int,
        exit_code: int | None,
        *,
        error_type: str | None = None,
        message: str = "",
        traceback: str = "",
        bad_input: bool = False,
    ) -> None:
        self.rank = rank
        self.exit_code = exit_code
        self.signal_name = _signal_name(exit_code)
        self.error_type = error_type
        self.traceback = traceback
        self.bad_input = bad_input
        if error_type is None and message:
            self.message = message
            line = f"{message}; the ranks were stopped"
        elif error_type is not None:
            self.message = message
            line = f"rank {rank} failed: {error_type}: {' '.join(message.split())}".rstrip(": ")
        else:
            ended = (
                f"was killed by {self.signal_name}"
                if self.signal_name
                else f"exited with code {exit_code} before its function returned"
            )
            self.message = f"rank {rank} {ended}"
            line = f"{self.message}; the other ranks were stopped"
        super().__init__(line)


def debugging() -> bool:
    """Whether COLROW_DEBUG asks for tracebacks and for the logs of what runs underneath."""
    return os.environ.get("COLROW_DEBUG", "") not in ("", "0")


def error_message(error: BaseException) -> str:
    """What an exception says, for a person: "model.gguf: No such file or directory"."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _signal_name(exit_code: int | None) -> str | None:
    if exit_code is None or exit_code >= 0:
        return None
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
