"""What happens inside :func:`colrow.launch.launch`: torchrun's agent, for the ranks of one host.

torchrun's usual rendezvous listens on every network interface, even for one host. Here the agent
keeps its bookkeeping in its own memory, and the ranks meet in a file.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from colrow._rank_environment import (
    STORE_VARIABLE,
    allocator_variables,
    inherited_environment,
)
from colrow.launch import BAD_INPUT, RankFailure, error_message

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_NOISY_LOGGERS = (
    "torch.distributed.elastic",
    "torch.multiprocessing.spawn",
    "torchelastic-events-null",
)
_SECONDS_TO_STOP = 5
# What Gloo, NCCL, the MPI engine and torch's stores say on a rank whose peer is gone.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|gloo/transport|ncclRemoteError"
    r"|socket (error|closed|timeout)|wait timeout|timed out|process of rank \d+ has ended",
    re.IGNORECASE,
)


def run_ranks(
    function: Callable[..., T],
    args: tuple[object, ...],
    *,
    ranks: int,
    threads: int,
    max_restarts: int,
    timeout_seconds: float | None,
    quiet: bool,
    seconds_to_stop: float = 5,
) -> list[T]:
    """What :func:`colrow.launch.launch` does for more than one rank; see there."""
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{function!r} cannot be sent to another process ({error}): define it at the top "
            "level of a module"
        ) from None
    directory = Path(tempfile.mkdtemp(prefix="colrow-"))
    try:
        with _signal_handlers_kept(), _quiet(quiet):
            spec = WorkerSpec(
                role="rank",
                local_world_size=ranks,
                rdzv_handler=_OneHost(),
                entrypoint=_run_rank,
                args=(function, args),
                max_restarts=max_restarts,
                monitor_interval=0.1,
            )
            ended = _run_agent(_Agent(spec, directory, threads, timeout_seconds, seconds_to_stop))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if isinstance(ended, signal.Signals):
        # The ranks are stopped and the caller's handlers are back: now the signal is the caller's.
        gc.collect()  # the agent's semaphores, of which a killed process leaves a warning
        signal.raise_signal(ended)
        raise RuntimeError(f"the ranks were stopped by {ended.name}")
    return [pickle.loads(ended[rank]) for rank in range(ranks)]


def _run_agent(agent: _Agent) -> dict[int, bytes] | signal.Signals:
    """The ranks' pickled results, or the signal that ended the wait for them."""
    try:
        result = agent.run()
    except SignalException as stop:
        return stop.sigval
    if result.is_failed():
        raise _root_cause(agent, result)
    values: dict[int, bytes] = result.return_values
    return values


class _OneHost(RendezvousHandler):
    """A rendezvous that one agent holds with itself; nothing is opened for it."""

    def get_backend(self) -> str:
        return "one-host"

    def next_rendezvous(self) -> RendezvousInfo:
        # The address goes into MASTER_ADDR and MASTER_PORT, which _run_rank removes.
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "colrow"

    def shutdown(self) -> bool:
        return True


class _Agent(LocalElasticAgent):
    """torchrun's agent, which also keeps every rank's exit code and stops at a deadline."""

    def __init__(
        self,
        spec: WorkerSpec,
        directory: Path,
        threads: int,
        timeout_seconds: float | None,
        seconds_to_stop: float,
    ) -> None:
        logs = DefaultLogsSpecs(log_dir=str(directory / "torchelastic"))
        super().__init__(spec, logs)
        self._shutdown_timeout = math.ceil(seconds_to_stop)  # after a signal
        self._directory = directory
        self._threads = threads
        self._timeout_seconds = timeout_seconds
        self._started_at = time.monotonic()
        self.attempt_directory = directory
        self.processes: dict[int, Any] = {}

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.attempt_directory = Path(tempfile.mkdtemp(prefix="attempt-", dir=self._directory))
        environment = {
            STORE_VARIABLE: str(self.attempt_directory / "store"),
            "OMP_NUM_THREADS": str(self._threads),
            **allocator_variables(),
            "TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(
                number.name for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN
            ),
        }
        with inherited_environment(environment), _sigint_blocked():
            process_ids: dict[int, Any] = super()._start_workers(worker_group)
        children = {child.pid: child for child in multiprocessing.active_children()}
        self.processes = {rank: children.get(pid) for rank, pid in process_ids.items()}
        return process_ids

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # A rank failed: the others have nothing to save.
        self._shutdown(timeout=_SECONDS_TO_STOP)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        seconds = self._timeout_seconds
        if seconds is not None and time.monotonic() - self._started_at > seconds:
            raise TimeoutError(f"the ranks did not finish within {seconds:g} seconds")
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY:
            # A rank that returned waits for the others, so one that is gone left its function;
            # torch's agent would wait for its result for ever.
            gone = [rank for rank, process in self.processes.items() if _exit_code(process) == 0]
            if gone:
                pid = self.processes[gone[0]].pid
                failure = ProcessFailure(local_rank=gone[0], pid=pid, exitcode=0, error_file="")
                return RunResult(state=WorkerState.FAILED, failures={gone[0]: failure})
        return result


def _run_rank(function: Callable[..., object], args: tuple[object, ...]) -> bytes:
    """Runs in the rank's process. The result is pickled here, so that a failure to is reported."""
    # A rank inside a collective runs no Python handler; it has nothing to tidy up either.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # Nobody listens there.
    os.environ.pop("MASTER_ADDR", None)
    os.environ.pop("MASTER_PORT", None)
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


def _write_error(error: Exception) -> None:
    record = {
        "time_ns": time.time_ns(),
        "error_type": type(error).__name__,
        "message": error_message(error),
        "traceback": "".join(traceback.format_exception(error)),
        "bad_input": isinstance(error, BAD_INPUT),
        "lost_peer": _lost_peer(error),
    }
    path = Path(os.environ[STORE_VARIABLE]).parent / f"rank-{os.environ['RANK']}.json"
    path.with_suffix(".part").write_text(json.dumps(record))
    path.with_suffix(".part").replace(path)


def _lost_peer(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, (RuntimeError, OSError)) and _LOST_PEER.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _root_cause(agent: _Agent, result: RunResult) -> RankFailure:
    """The failure that the others follow from.

    First the earliest exception that is not a lost connection, then a process that died without
    one, then the earliest lost connection.
    """
    exit_codes = {rank: _exit_code(process) for rank, process in agent.processes.items()}
    for rank, failure in result.failures.items():
        exit_codes[rank] = failure.exitcode
    errors: dict[int, dict[str, Any]] = {}
    for rank in exit_codes:
        path = agent.attempt_directory / f"rank-{rank}.json"
        if path.exists():
            errors[rank] = json.loads(path.read_text())
    # Not 0: a rank that returned waits for the others before it ends.
    stopped = (None, -signal.SIGTERM)

    def order(rank: int) -> tuple[int, int]:
        if rank in errors:
            return (2 if errors[rank]["lost_peer"] else 0, errors[rank]["time_ns"])
        if rank in result.failures:
            return (1, 0)
        return (3, 0) if exit_codes[rank] in stopped else (1, 1)

    rank = min(exit_codes, key=order)
    if rank not in errors:
        return RankFailure(rank, exit_codes[rank])
    error = errors[rank]
    fields = ("error_type", "message", "traceback", "bad_input")
    return RankFailure(rank, exit_codes[rank], **{name: error[name] for name in fields})


def _exit_code(process: Any) -> int | None:
    code: int | None = process.exitcode if process is not None else None
    return code


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Processes started inside import torch first; an interrupt waits, and prints no traceback."""
    resource_tracker.ensure_running()  # which unblocks the signal when it has to start
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """torch's agent installs its own handlers and leaves them behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Keeps torch's own account of a failure off the terminal; RankFailure is the account."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS] if quiet else []
    before = [logger.propagate for logger in loggers]
    silence = logging.NullHandler()
    for logger in loggers:
        logger.addHandler(silence)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(silence)
            logger.propagate = propagate
