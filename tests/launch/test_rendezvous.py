"""Where ranks meet that another launcher started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from colrow.launch.rendezvous import rendezvous_arguments

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MPIEXEC = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
MPIEXEC_LOCAL = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
BY_HAND = ("RANK", "WORLD_SIZE")
TORCHRUN_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")


def start_two(
    names: tuple[str, str], local: tuple[str, str], local_size: int = 2, **more: str
) -> list[subprocess.Popen[str]]:
    code = (
        "import os\nfrom tests.sockets import *\nfrom tests.launch.test_ranks import meet\n"
        "import torch.distributed as dist\nrank = meet()\nsockets = open_sockets(os.getpid())\n"
        "assert sockets and not beyond_loopback(sockets), sockets\ndist.barrier()\nprint(rank)\n"
    )
    environment = {name: os.environ[name] for name in os.environ if name not in VARIABLES}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment |= {"MASTER_PORT": str(probe.getsockname()[1]), **more}
    started = []
    for rank in range(2):
        environment |= dict(zip(names, (str(rank), "2"), strict=True))
        environment |= dict(zip(local, (str(rank % local_size), str(local_size)), strict=True))
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            )
        )
    return started


@pytest.mark.parametrize(
    ("names", "local", "address"),
    [
        (MPIEXEC, MPIEXEC_LOCAL, {}),
        (MPIEXEC, MPIEXEC_LOCAL, {"MASTER_ADDR": "localhost"}),
        (BY_HAND, TORCHRUN_LOCAL, {"MASTER_ADDR": "127.0.0.1"}),
    ],
)
def test_ranks_of_other_launchers_meet_on_loopback(
    names: tuple[str, str], local: tuple[str, str], address: dict[str, str]
) -> None:
    outputs = [run.communicate(timeout=60) for run in start_two(names, local, **address)]
    assert outputs == [("0\n", ""), ("1\n", "")]


def test_a_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("0", "2", "0", "2", "localhost", "foo"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="MASTER_PORT is 'foo', not a whole number"):
        rendezvous_arguments()
    monkeypatch.setenv("MASTER_PORT", "70000")
    with pytest.raises(ValueError, match="MASTER_PORT is 70000: use 1 to 65535"):
        rendezvous_arguments()


def test_ranks_on_several_hosts_need_an_address() -> None:
    for process in start_two(MPIEXEC, MPIEXEC_LOCAL, local_size=1):
        assert "set MASTER_ADDR to the address" in process.communicate(timeout=60)[1]
