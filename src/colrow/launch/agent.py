"""What happens inside :func:`colrow.launch.launch`: torchrun's agent, for the ranks of one host.

torchrun's usual rendezvous listens on every network interface, even for one host. Here the agent
keeps its bookkeeping in its own memory, and the ranks meet in a file.
"""

from __future__ import annotations

import gc
import logging
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

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

from colrow.launch.environment import (
    STORE_VARIABLE,
    allocator_variables,
    inherited_environment,
)
from colrow.launch.failure import Evidence, root_cause
from colrow.launch.hangs import HangDetector
from colrow.launch.process import run_rank
from colrow.launch.signals import HANDLED, handlers_kept, sigint_blocked
from colrow.leftovers import scratch_directory

T = TypeVar("T")

_NOISY_LOGGERS = (
    "torch.distributed.elastic",
    "torch.multiprocessing.spawn",
    "torchelastic-events-null",
)
_SECONDS_TO_STOP = 5
_SECONDS_TO_STOP_AFTER_A_HANG = 2  # those that waited are in a collective, where no handler runs
_SECONDS_OF_ONE_SIGNAL = 2.0


def run_ranks(
    function: Callable[..., T],
    args: tuple[object, ...],
    *,
    ranks: int,
    threads: str,
    max_restarts: int,
    timeout_seconds: float | None,
    quiet: bool,
    seconds_to_stop: float = 5,
    hang_seconds: float | None = None,
) -> list[T]:
    """What :func:`colrow.launch.launch` does for more than one rank; see there."""
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{function!r} cannot be sent to another process ({error}): define it at the top "
            "level of a module"
        ) from None
    limits = (timeout_seconds, seconds_to_stop, hang_seconds)
    directory = scratch_directory("ranks")
    try:
        with _quiet(quiet), handlers_kept():
            spec = WorkerSpec(
                role="rank",
                local_world_size=ranks,
                rdzv_handler=_OneHost(),
                entrypoint=run_rank,
                args=(function, args),
                max_restarts=max_restarts,
                monitor_interval=0.1,
            )
            ended = _run_agent(_Agent(spec, directory, threads, *limits))
    except SignalException as stop:  # a moment after the ranks ended
        ended = stop.sigval
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
        agent.kill()  # what is left after a second signal
        return stop.sigval
    if result.is_failed():
        raise root_cause(agent.evidence)
    values: dict[int, bytes] = result.return_values
    return values


class _OneHost(RendezvousHandler):
    """A rendezvous that one agent holds with itself; nothing is opened for it."""

    def get_backend(self) -> str:
        return "one-host"

    def next_rendezvous(self) -> RendezvousInfo:
        # The address goes into MASTER_ADDR and MASTER_PORT, which run_rank removes.
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
        threads: str,
        timeout_seconds: float | None,
        seconds_to_stop: float,
        hang_seconds: float | None,
    ) -> None:
        logs = DefaultLogsSpecs(log_dir=str(directory / "torchelastic"))
        super().__init__(spec, logs)
        self._shutdown_timeout = math.ceil(seconds_to_stop)  # after a signal
        self._directory = directory
        self._threads = threads
        self._timeout_seconds = timeout_seconds
        self._started_at = time.monotonic()
        self._processes: dict[int, Any] = {}
        self._hangs = HangDetector(hang_seconds)
        self.evidence = Evidence(directory, {})

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        directory = Path(tempfile.mkdtemp(prefix="attempt-", dir=self._directory))
        environment = {
            STORE_VARIABLE: str(directory / "store"),
            "OMP_NUM_THREADS": self._threads,
            **allocator_variables(),
            "TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(
                number.name for number in HANDLED if signal.getsignal(number) != signal.SIG_IGN
            ),
        }
        with inherited_environment(environment), sigint_blocked():
            process_ids: dict[int, Any] = super()._start_workers(worker_group)
        children = {child.pid: child for child in multiprocessing.active_children()}
        self._processes = {rank: children.get(pid) for rank, pid in process_ids.items()}
        self.evidence = Evidence(directory, dict(process_ids))
        return process_ids

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = _SECONDS_TO_STOP
    ) -> None:
        # Ctrl-C may come twice, from the terminal and from what started this process; a later
        # signal ends the wait for ranks that are saving.
        began = time.monotonic()

        def again(number: int, frame: FrameType | None) -> None:
            if time.monotonic() - began > _SECONDS_OF_ONE_SIGNAL:
                name = signal.Signals(number)
                raise SignalException(f"{name.name} again", name)

        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                if callable(signal.getsignal(number)):
                    signal.signal(number, again)
        super()._shutdown(death_sig, timeout)

    def kill(self) -> None:
        """Ends the ranks that still run at once."""
        for process in self._processes.values():
            if process is not None and process.exitcode is None:
                process.kill()
                process.join(_SECONDS_TO_STOP)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # A rank failed: the others have nothing to save.
        for rank in self.evidence.hung:
            with suppress(ProcessLookupError):
                os.kill(self.evidence.processes[rank], signal.SIGKILL)
        self._shutdown(
            timeout=_SECONDS_TO_STOP_AFTER_A_HANG if self.evidence.hung else _SECONDS_TO_STOP
        )

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        seconds = self._timeout_seconds
        if seconds is not None and time.monotonic() - self._started_at > seconds:
            raise TimeoutError(f"the ranks did not finish within {seconds:g} seconds")
        healthy = RunResult(state=WorkerState.HEALTHY)
        running = {
            rank: self.evidence.processes[rank]
            for rank, process in self._processes.items()
            if process is not None and process.exitcode is None
        }
        if self._hangs.found(running, self.evidence):
            return self._failed()
        codes = {rank: _exit_code(process) for rank, process in self._processes.items()}
        # Before torch's agent does: it stops the others, and waits 30 s for one that hangs.
        if any(codes.values()):
            return self._failed() if self.evidence.complete(codes) else healthy
        result: RunResult = super()._monitor_workers(worker_group)
        # A rank that returned waits for the others, so one that is gone left its function;
        # torch's agent would wait for its result for ever.
        if result.state == WorkerState.HEALTHY and 0 in codes.values():
            self.evidence.complete(codes)
            return self._failed()
        if result.state == WorkerState.FAILED:  # since the look above; the others were stopped
            self.evidence.exit_codes = {r: f.exitcode for r, f in result.failures.items()}
        return result

    def _failed(self) -> RunResult:
        evidence = self.evidence
        ended = {rank: code for rank, code in evidence.exit_codes.items() if code is not None}
        if set(ended.values()) == {128 + signal.SIGTERM}:
            self._remaining_restarts = 0  # they were asked to stop, and did
        failures = {
            rank: ProcessFailure(rank, evidence.processes[rank], ended.get(rank, -1), "")
            for rank in ended or evidence.hung
        }
        return RunResult(state=WorkerState.FAILED, failures=failures)


def _exit_code(process: Any) -> int | None:
    code: int | None = process.exitcode if process is not None else None
    return code


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
