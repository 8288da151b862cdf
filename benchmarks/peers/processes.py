"""A contestant's processes: started, told what to do, ended."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks.peers.contestants import Contestant
from benchmarks.peers.workloads import Workload
from colrow.launch.environment import allocator_variables

SECONDS_TO_ANSWER = 600.0


class ContestantError(Exception):
    """A contestant cannot take part, or stopped; says why."""


class Processes:
    """All ranks of one contestant, in processes of their own that outlive its turns.

    Args:
        threads: of each rank.
        directory: the weights.
        engine: what carries the bytes of contestants with several ranks: "gloo" or "mpi".

    Raises:
        ContestantError: a rank failed.
    """

    def __init__(
        self,
        workload: Workload,
        contestant: Contestant,
        *,
        threads: int,
        directory: Path,
        engine: str,
    ) -> None:
        self._files = ExitStack()
        self._logs = []
        for _ in range(contestant.ranks):
            log = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            self._logs.append(log)
        self._answers: list[queue.Queue[str]] = []
        self._ranks: list[subprocess.Popen[str]] = []
        arguments = [workload.name, contestant.name, str(directory), engine]
        port = _free_port()
        try:
            for rank in range(contestant.ranks):
                process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.peers.rank", *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._logs[rank],
                    text=True,
                    env=_environment(contestant, rank, threads, port),
                )
                self._ranks.append(process)
                self._answers.append(_reader(process))
            self._gather()
        except BaseException:
            self.close()
            raise

    def ask(self, command: str) -> list[Any]:
        """Sends "check" or "measure" to every rank; their answers, by rank."""
        for process in self._ranks:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # its last answer says why
                process.stdin.write(command + "\n")
                process.stdin.flush()
        return self._gather()

    def _gather(self) -> list[Any]:
        found: dict[int, Any] = {}
        deadline = time.monotonic() + SECONDS_TO_ANSWER
        while len(found) < len(self._ranks):
            for rank, answers in enumerate(self._answers):
                if rank in found:
                    continue
                try:
                    line = answers.get(timeout=0.05)
                except queue.Empty:
                    continue
                answer = json.loads(line) if line else {"error": self._how_it_ended(rank)}
                if "error" in answer:
                    raise ContestantError(f"rank {rank}: {answer['error']}")
                found[rank] = answer
            if time.monotonic() > deadline:
                raise ContestantError(f"no answer within {SECONDS_TO_ANSWER:.0f} seconds")
        return [found[rank] for rank in range(len(self._ranks))]

    def _how_it_ended(self, rank: int) -> str:
        self._ranks[rank].wait()
        self._logs[rank].seek(0)
        lines = self._logs[rank].read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1][:300]}" if lines else ""
        return f"ended with code {self._ranks[rank].returncode}{last}"

    def close(self) -> None:
        """Ends the processes: end of input first, then by force."""
        for process in self._ranks:
            if process.stdin is not None and process.poll() is None:
                process.stdin.close()
        for process in self._ranks:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._files.close()


def _reader(process: subprocess.Popen[str]) -> queue.Queue[str]:
    """The lines that a process writes, as they come; "" at its end."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    return lines


def _environment(contestant: Contestant, rank: int, threads: int, port: int) -> dict[str, str]:
    """torchrun's variables, everything on loopback, and nothing fetched.

    colrow's ranks are also told what its own launcher tells them.
    """
    ranks = contestant.ranks
    own = contestant.split and contestant.name.startswith("colrow")
    environment = {
        **os.environ,
        **(allocator_variables() if own else {}),
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(Path(".cache/peers/extensions").absolute()),
    }
    if ranks == 1:
        return environment
    return {
        **environment,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),  # DeepSpeed's shared-memory collectives crash without it
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
