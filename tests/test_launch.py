from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from colrow.launch import (
    RankEnvironment,
    RankFailure,
    launch,
    rank_environment,
)
from colrow.launch.environment import allocator_variables
from colrow.launch.rendezvous import rendezvous_arguments
from tests.ranks import child_ranks, run_world
from tests.sockets import beyond_loopback, open_sockets

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def meet() -> int:
    from colrow.launch.rendezvous import rendezvous_arguments

    dist.init_process_group("gloo", **rendezvous_arguments())
    return dist.get_rank()


def describe(number: int) -> tuple[int, float, str, str, set[str]]:
    rank = meet()
    total = torch.tensor(float(rank + number))
    dist.all_reduce(total)
    launcher = rank_environment()
    assert launcher is not None
    threads, sockets = os.environ["OMP_NUM_THREADS"], open_sockets(os.getppid())
    dist.barrier()
    return rank, total.item(), threads, launcher.launcher, sockets


def allocator_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}


def fail_on_rank_1(how: str) -> None:
    if meet() == 1:
        if how == "raise":
            raise LookupError("layer 3\nhas no bias")
        if how == "reject":
            raise ValueError("layer 3 has no bias")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "leave":
            os._exit(0)
        time.sleep(60)
    dist.all_reduce(torch.ones(1))


def fail_the_first_time(directory: str) -> int:
    rank = meet()
    marker = Path(directory) / "tried"
    if rank == 0 and not marker.exists():
        marker.touch()
        raise LookupError("once")
    dist.barrier()
    return rank


def test_results_come_by_rank_and_nothing_listens_beyond_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "eth0")  # for the runs on several hosts
    results = launch(describe, (5,), ranks=2, threads_per_rank=3)
    assert [result[:4] for result in results] == [
        (0, 11.0, "3", "colrow"),
        (1, 11.0, "3", "colrow"),
    ]
    assert results[0][4] and not beyond_loopback(results[0][4] | results[1][4])
    assert "OMP_NUM_THREADS" not in os.environ


def test_ranks_keep_freed_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in allocator_settings():
        monkeypatch.delenv(name)
    assert allocator_variables() == {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    assert launch(allocator_settings, ranks=2) == [allocator_variables()] * 2
    assert allocator_settings() == {}


def users_settings() -> tuple[dict[str, str], int]:
    return allocator_settings(), torch.get_num_threads()


def test_the_users_allocator_and_thread_count_win(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in allocator_settings():
        monkeypatch.delenv(name)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = launch(users_settings, ranks=2, threads_per_rank=3)
    assert found == [({"MALLOC_ARENA_MAX": "2"}, 1)] * 2


def test_one_rank_runs_here() -> None:
    assert launch(os.getpid, ranks=1) == [os.getpid()]


@pytest.mark.parametrize(
    ("how", "line", "exit_code"),
    [
        ("raise", "rank 1 failed: LookupError: layer 3 has no bias", 1),
        ("kill", "rank 1 was killed by SIGKILL; the other ranks were stopped", -9),
        (
            "leave",
            "rank 1 exited with code 0 before its function returned; the other ranks were stopped",
            0,
        ),
    ],
)
def test_the_rank_that_failed_is_named(
    how: str,
    line: str,
    exit_code: int,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RankFailure) as caught:
        launch(fail_on_rank_1, (how,), ranks=2, timeout_seconds=60)
    failure = caught.value
    assert str(failure) == line
    assert (failure.rank, failure.exit_code, failure.bad_input) == (1, exit_code, False)
    assert failure.signal_name == ("SIGKILL" if how == "kill" else None)
    assert ("fail_on_rank_1" in failure.traceback) == (how == "raise")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_value_error_says_that_the_input_is_bad() -> None:
    with pytest.raises(RankFailure) as caught:
        launch(fail_on_rank_1, ("reject",), ranks=2)
    assert caught.value.bad_input
    assert caught.value.message == "layer 3 has no bias"


def test_a_deadline_stops_the_ranks() -> None:
    with pytest.raises(TimeoutError, match="within 3 seconds"):
        launch(fail_on_rank_1, ("sleep",), ranks=2, timeout_seconds=3)


def test_ranks_are_started_again_when_asked_to(tmp_path: Path) -> None:
    assert launch(fail_the_first_time, (str(tmp_path),), ranks=2, max_restarts=1) == [0, 1]


def test_bad_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ranks=0"):
        launch(os.getpid, ranks=0)
    with pytest.raises(ValueError, match="top level of a module"):
        launch(lambda: 0, ranks=2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="already rank 1 of 2, started by torchrun"):
        launch(os.getpid, ranks=2)


def test_a_thread_count_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("abc", "0", "-1", "2;3"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        with pytest.raises(ValueError, match=f"OMP_NUM_THREADS is '{value}': set it to a number"):
            launch(meet, ranks=2)


def announce_and_sleep() -> None:
    print("ready", flush=True)
    time.sleep(60)


def test_an_interrupt_stops_the_ranks() -> None:
    code = (
        "from colrow.launch import launch\n"
        "from tests.test_launch import announce_and_sleep\n"
        "try:\n    launch(announce_and_sleep, ranks=2)\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
        # A shell's background job ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == ("interrupted\n", "")


def test_ranks_whose_launcher_died_while_they_started_do_not_run() -> None:
    code = (
        "from colrow.launch import launch\n"
        "from tests.test_launch import announce_and_sleep\n"
        "launch(announce_and_sleep, ranks=2)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    while len(child_ranks(process.pid)) < 2:
        time.sleep(0.02)
    time.sleep(0.2)
    process.kill()
    assert process.communicate(timeout=120)[0] == ""  # when the last rank has ended


def test_fresh_ranks_for_tests() -> None:
    assert run_world(1, meet) == [0]


SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"RANK": "1"}, None),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            RankEnvironment("torchrun", 3, 4, 1, 2),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            RankEnvironment("mpiexec", 3, 4, 1, 2),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
            RankEnvironment("mpiexec", 1, 2, 0, 1),
        ),
        (
            SRUN | {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3"},
            RankEnvironment("srun", 5, 7, 1, 3),
        ),
        (
            SRUN
            | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
            | {"PMI_RANK": "5", "PMI_SIZE": "8"},
            RankEnvironment("srun", 5, 8, 1, 4),
        ),
        # The shell of an salloc: the job's tasks, but no step, or the interactive one.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),
        (SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_NTASKS": "8"}, None),
        # srun --pty bash
        (SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_launchers_are_recognised(
    variables: dict[str, str],
    expected: RankEnvironment | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rank_environment() == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "says rank 2 of 2.*if they are left over, unset them"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "says rank 0 of 0"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "set LOCAL_RANK and LOCAL_WORLD_SIZE"),
    ],
)
def test_a_broken_environment_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        rank_environment()


MPIEXEC = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
MPIEXEC_LOCAL = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
BY_HAND = ("RANK", "WORLD_SIZE")
TORCHRUN_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")


def start_two(
    names: tuple[str, str], local: tuple[str, str], local_size: int = 2, **more: str
) -> list[subprocess.Popen[str]]:
    code = (
        "import os\nfrom tests.sockets import *\nfrom tests.test_launch import meet\n"
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
                cwd=Path(__file__).parents[1],
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
