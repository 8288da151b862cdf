"""Signals at any moment of a command: the right message or none, and never a traceback."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from tests.cli.test_sockets import OF_TRAIN
from tests.ranks import child_ranks
from tests.train.curves import write_inputs

Target = Literal["terminal", "twice", "parent", "rank"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
TRAIN = ["train", *OF_TRAIN, "--tp", "2", "--steps", "1000000", "--save-every", "3"]
# What a run says when all is well, and the line of a command that failed.
RIGHT = re.compile(
    r"(\.\.\. |llama: colrow's decoder$"
    r"|step |\d+ ranks = |tp |pp |rank|stopped by |held-out |continuing "
    r"|colrow \w+: rank \d was killed)"
)


class Command:
    """A command in a session of its own, as a terminal starts it."""

    def __init__(self, directory: Path, words: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "colrow.cli", *words],
            cwd=directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # A shell's background job ignores SIGINT, and so would all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.lines: list[str] = []

    def until(self, pattern: str) -> None:
        """Reads what it says up to the line that matches."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if re.search(pattern, line):
                return

    def send(self, number: signal.Signals, target: Target) -> None:
        """As a terminal sends it, once or twice, or to one process alone."""
        group, ranks = self.process.pid, child_ranks(self.process.pid)
        if target in ("terminal", "twice"):
            os.killpg(group, number)
            if target == "twice":
                time.sleep(0.3)
                if self.process.poll() is None:
                    os.killpg(group, number)
        else:
            os.kill(ranks[-1] if target == "rank" and ranks else group, number)

    def end(self) -> None:
        """Waits; asserts that it said nothing that it should not."""
        _, rest = self.process.communicate(timeout=90)
        self.lines += rest.splitlines(keepends=True)
        wrong = [line for line in self.lines if not RIGHT.match(line)]
        assert not wrong, "".join(self.lines)
        assert self.process.returncode != 0


@pytest.mark.parametrize("engine", ["mpi", pytest.param("gloo", marks=pytest.mark.slow)])
def test_an_interrupt_prints_no_traceback(engine: str, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    command = Command(tmp_path, [*TRAIN, "--output", "run", "--engine", engine])
    command.until("step 4/")
    command.send(signal.SIGINT, "twice")
    command.end()
    assert "saved after step" in command.lines[-1]
    assert command.process.returncode == 130


def test_an_interrupt_while_a_command_is_imported_prints_nothing(tmp_path: Path) -> None:
    """As soon as code of the command runs: before that Python itself looks for the module."""
    for seconds in (0.15, 0.3, 0.6, 1.2, 2.4):
        command = Command(tmp_path, ["plan", "llama-3-70b", "--gpus", "64"])
        time.sleep(seconds)
        command.process.send_signal(signal.SIGINT)
        _, said = command.process.communicate(timeout=60)
        if "_get_module_details" not in said:
            break
    assert "Traceback" not in said and "KeyboardInterrupt" not in said


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", ["terminal", "twice", "parent", "rank"])
@pytest.mark.parametrize("number", SIGNALS)
def test_no_signal_at_any_moment_prints_a_traceback(
    number: signal.Signals, target: Target, tmp_path: Path
) -> None:
    write_inputs(tmp_path)
    moments = random.Random(number)
    for attempt in range(4):
        engine = ("mpi", "gloo")[attempt % 2]
        command = Command(tmp_path, [*TRAIN, "--output", f"run{attempt}", "--engine", engine])
        if attempt < 2:
            time.sleep(moments.uniform(0.2, 8))
        else:  # at once, or while it saves
            command.until("step 2/" if attempt == 2 else "step 3/")
            time.sleep(moments.uniform(0, 0.1))
        command.send(number, target)
        command.end()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3, 6, 10, 15])
def test_an_interrupted_zoo_prints_no_traceback(seconds: float, tmp_path: Path) -> None:
    command = Command(tmp_path, ["zoo", "--only", "llama,gpt2,mixtral", "--tp", "2"])
    time.sleep(seconds)
    command.send(signal.SIGINT, "terminal")
    _, said = command.process.communicate(timeout=60)
    assert "Traceback" not in said and "KeyboardInterrupt" not in said
