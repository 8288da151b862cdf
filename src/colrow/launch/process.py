"""What runs in the process of a rank that :func:`colrow.launch.launch` started."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from colrow.launch.environment import STORE_VARIABLE
from colrow.launch.errors import BAD_INPUT, error_message
from colrow.launch.places import PlaceReporter
from colrow.launch.signals import end_on_sigint

# What Gloo, NCCL, the MPI engine and torch's stores say on a rank whose peer is gone or hangs.
_TIMED_OUT = re.compile(r"socket timeout|wait timeout|timed out", re.IGNORECASE)
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|gloo/transport|ncclRemoteError"
    r"|socket (error|closed)|process of rank \d+ has ended",
    re.IGNORECASE,
)


def run_rank(function: Callable[..., object], args: tuple[object, ...]) -> bytes:
    """Calls the function; the result is pickled here, so that a failure to is reported."""
    # A rank inside a collective runs no Python handler; it has nothing to tidy up either.
    end_on_sigint()
    # The system interrupts a rank whose launcher dies, but not one that is still starting.
    launcher = multiprocessing.parent_process()
    if launcher is not None and not launcher.is_alive():
        os._exit(1)
    # Nobody listens there.
    os.environ.pop("MASTER_ADDR", None)
    os.environ.pop("MASTER_PORT", None)
    reporter = PlaceReporter(_report("place"))
    reporter.look()
    reporter.start()
    try:
        result = pickle.dumps(function(*args), protocol=pickle.HIGHEST_PROTOCOL)
        if dist.is_initialized():
            dist.destroy_process_group()
        return result
    except SystemExit as stop:
        if not stop.code:
            return pickle.dumps(None)
        code = stop.code if isinstance(stop.code, int) else 1
        if code is not stop.code:
            print(stop.code, file=sys.stderr)
    except Exception as error:
        code = 1
        _write_error(error)
    # Not by the interpreter's own end, which can trip over the process group's threads.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(what: str) -> Path:
    """The file of this rank in the directory that its launcher reads."""
    return Path(os.environ[STORE_VARIABLE]).parent / f"rank-{os.environ['RANK']}.{what}"


def _write_error(error: Exception) -> None:
    record = {
        "time_ns": time.time_ns(),
        "error_type": type(error).__name__,
        "message": error_message(error),
        "traceback": "".join(traceback.format_exception(error)),
        "bad_input": isinstance(error, BAD_INPUT),
        "timed_out": _says(error, _TIMED_OUT),
        "lost_peer": _says(error, _TIMED_OUT) or _says(error, _LOST_PEER),
    }
    path = _report("json")
    path.with_suffix(".part").write_text(json.dumps(record))
    path.with_suffix(".part").replace(path)


def _says(error: BaseException | None, what: re.Pattern[str]) -> bool:
    while error is not None:
        if isinstance(error, (RuntimeError, OSError)) and what.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
