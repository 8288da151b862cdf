"""What the MPI engine alone has: futures, communicators, and processes that nobody watches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import colrow
from colrow.comm import compat
from colrow.launch import launch

pytest.importorskip("mpi4py")


def refuse_sizes_and_dtypes_that_do_not_fit(rank: int) -> None:
    ones = torch.ones
    for size, dtype in ((5, torch.float32), (3, torch.float32), (4, torch.float64)):
        out = torch.zeros(size, dtype=dtype)
        with pytest.raises((TypeError, ValueError), match=r"all_gather: the output"):
            compat.all_gather_single(out, ones(2))
        with pytest.raises((TypeError, ValueError), match="reduce_scatter: the input"):
            compat.reduce_scatter_single(torch.zeros(2), ones(size, dtype=dtype))
    for own, other in ((3, 2), (1, 2)):
        with pytest.raises(ValueError, match="all_gather: this rank's element of the list"):
            dist.all_gather([ones(own), ones(other)][:: -1 if rank else 1], ones(2))
    with pytest.raises(ValueError, match="all_gather: 1 tensors were given for 2 ranks"):
        dist.all_gather([ones(2)], ones(2))
    with pytest.raises(ValueError, match="reduce_scatter: 1 tensors"):
        dist.reduce_scatter(ones(2), [ones(2)])
    with pytest.raises(ValueError, match="reduce_scatter: the output of shape"):
        dist.reduce_scatter(ones(3), [ones(2), ones(2)])
    with pytest.raises(ValueError, match="3 rows, which do not divide evenly over 2 ranks"):
        dist.all_to_all_single(ones(3), ones(3))
    with pytest.raises(ValueError, match=r"2 rows, which the sizes \[2, 2\] do not divide"):
        dist.all_to_all_single(ones(2), ones(2), [1, 1], [2, 2])
    with pytest.raises(ValueError, match="this rank's own output"):
        dist.all_to_all([ones(3), ones(3)], [ones(2), ones(2)])
    if rank == 0:
        with pytest.raises(ValueError, match="the root's element"):
            dist.gather(ones(2), [ones(3), ones(2)])
        with pytest.raises(ValueError, match="scatter: the output"):
            dist.scatter(ones(3), [ones(2), ones(2)])
        dist.send(ones(2), 1)
    else:
        with pytest.raises(RuntimeError, match="has 8 bytes, but this rank expects 16"):
            dist.recv(torch.zeros(4), 0)
    x = ones(3)
    dist.all_reduce(x)  # nobody was left behind
    assert x.tolist() == [2, 2, 2]


def attack() -> None:
    mesh = colrow.init_mesh(tp=2, device="cpu", engine="mpi")
    from mpi4py import MPI

    rank = mesh.tp.rank
    # Futures of two groups, asked for in another order on each rank.
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    tensors = [torch.ones(10), torch.ones(10)]
    for index in (0, 1) if rank == 0 else (1, 0):
        work = dist.all_reduce(tensors[index], group=groups[index], async_op=True)
        assert work is not None
        future = work.get_future()
        assert work.get_future() is future
        tensors.append(future.then(lambda done: done.value()[0] * 2))  # type: ignore[arg-type]
    assert [tensors[2].wait()[0].item(), tensors[3].wait()[0].item()] == [4, 4]  # type: ignore[attr-defined]
    assert work.wait() and work.is_completed()
    # A communicator is given back with its group, and MPI has no thousands of them.
    engine = groups[0]
    dist.destroy_process_group(engine)
    assert engine._comm == MPI.COMM_NULL
    # Messages that nobody waits for are not kept for ever.
    world = dist.group.WORLD
    for number in range(200):
        if rank == 0:
            dist.isend(torch.full((3,), float(number)), 1)
        else:
            x = torch.empty(3)
            dist.recv(x, 0)
            assert x[0] == number
        if number % 50 == 0:
            dist.barrier()
    assert len(world.pending) < 150  # type: ignore[union-attr]
    refuse_sizes_and_dtypes_that_do_not_fit(rank)


def test_futures_communicators_messages_that_nobody_waits_for_and_refusals() -> None:
    launch(attack, ranks=2, timeout_seconds=100)


def start(code: str, rank: int, port: int) -> subprocess.Popen[str]:
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **variables, "MASTER_ADDR": "127.0.0.1"},
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_rank_that_nobody_watches_is_missed_when_it_has_ended() -> None:
    code = """
        import os, time, torch, colrow
        mesh = colrow.init_mesh(tp=2, device="cpu", engine="mpi")
        if mesh.tp.rank == 1:
            os._exit(0)
        if os.fork() == 0:  # as a worker of a DataLoader: rank 0 ends all the same
            os.close(2)
            time.sleep(25)
            os._exit(0)
        torch.distributed.all_reduce(torch.ones(3))
    """
    port = free_port()
    processes = [start(code, rank, port) for rank in range(2)]
    try:
        processes[1].communicate(timeout=60)
        ended = time.monotonic()
        message = processes[0].communicate(timeout=60)[1]
    finally:
        for process in processes:
            process.kill()
    assert "all_reduce in a group of 2 ranks (rank 0) cannot complete" in message
    assert "the process of rank 1 has ended" in message
    assert processes[0].returncode == 1 and time.monotonic() - ended < 20


def test_torchrun_starts_the_ranks_again(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent("""
            import os, time, torch, colrow
            first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if os.environ["RANK"] == "0" and not first:
                time.sleep(1)  # what the first attempt left in the store is all there is
            mesh = colrow.init_mesh(tp=2, device="cpu", engine="mpi")
            x = torch.ones(1)
            torch.distributed.all_reduce(x)
            if first:
                os._exit(3)
            print(f"sum {x.item():g}", flush=True)
            torch.distributed.destroy_process_group()
        """)
    )
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [sys.executable, *command, f"--master-port={free_port()}", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.count("sum 2") == 2, done.stderr[-3000:]
