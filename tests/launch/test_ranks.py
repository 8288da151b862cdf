"""Ranks that :func:`colrow.launch.launch` starts: results, failures, signals, what they inherit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from colrow.launch import RankFailure, launch, rank_environment
from colrow.launch.environment import allocator_variables
from tests.ranks import child_ranks, run_world
from tests.sockets import beyond_loopback, open_sockets

ROOT = Path(__file__).parents[2]


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
    rank = meet()
    dist.barrier()  # Gloo prints by itself where a rank dies while another still connects to it
    if rank == 1:
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


@pytest.mark.new_interpreters
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


@pytest.mark.new_interpreters
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


@pytest.mark.new_interpreters
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
        "from tests.launch.test_ranks import announce_and_sleep\n"
        "try:\n    launch(announce_and_sleep, ranks=2)\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
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
        "from tests.launch.test_ranks import announce_and_sleep\n"
        "launch(announce_and_sleep, ranks=2)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    while len(child_ranks(process.pid)) < 2:
        time.sleep(0.02)
    time.sleep(0.2)
    process.kill()
    assert process.communicate(timeout=120)[0] == ""  # when the last rank has ended


def test_fresh_ranks_for_tests() -> None:
    assert run_world(1, meet) == [0]
