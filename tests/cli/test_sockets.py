"""Where commands listen while they run: on this host's loopback addresses alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sockets import Watch, beyond_loopback
from tests.train.curves import OPTIONS, write_inputs

TINY = ["--hidden", "32", "--layers", "2", "--heads", "2", "--vocab", "64", "--what", "model"]
TRAIN: dict[str, Any] = {**OPTIONS, "steps": 2, "model": "config.json", "data": "topics.txt"}
OF_TRAIN = [word for name, v in TRAIN.items() for word in (f"--{name.replace('_', '-')}", str(v))]
COMMANDS = {
    "train": ["train", *OF_TRAIN, "--tp", "2", "--output", "run"],
    "bench": ["bench", *TINY, "--tp", "2", "--batch", "1", "--sequence", "8", "--runs", "1"],
    "link": ["bench", "--link", "--tp", "2", "--seconds", "1"],
    "pipeline": ["bench", *TINY, "--pp", "2", "--batch", "2", "--sequence", "8", "--runs", "1"],
    "verify": ["verify", "--architecture", "gpt2", "--tp", "2"],
}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("train", "mpi"),
        pytest.param("train", "gloo", marks=slow),
        pytest.param("bench", "mpi", marks=slow),
        pytest.param("link", "gloo", marks=slow),
        pytest.param("pipeline", "mpi", marks=slow),
        pytest.param("verify", "mpi", marks=slow),
        pytest.param("zoo", "", marks=slow),
    ],
)
def test_a_command_listens_on_loopback_alone(name: str, engine: str, tmp_path: Path) -> None:
    if engine == "mpi" and importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    write_inputs(tmp_path)
    words = [*COMMANDS[name], "--engine", engine] if engine else ["zoo", "--only", "gpt2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "colrow.cli", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Whatever else is on this machine: these are for runs on several hosts.
        env={**os.environ, "OMP_NUM_THREADS": "1", "UCX_TLS": "all", "GLOO_SOCKET_IFNAME": "eth0"},
    )
    with Watch(process.pid) as watch:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert watch.seen and not beyond_loopback(watch.seen), watch.seen
