"""Every engine does what torch.distributed and colrow ask of it: one suite for all of them."""

from __future__ import annotations

import copy
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import colrow
from colrow.comm import compat, primitives
from colrow.comm import engine as engine_module
from colrow.comm.engine import choose_engine
from colrow.launch import RankFailure, launch
from tests.comm.endings import dies, late

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
SUM, AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG


def value(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Small whole numbers that depend on the rank: sums are exact in every dtype."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) + 3 * rank) % 7).to(dtype).view(shape)


def everyone(n: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [value(rank, *shape, dtype=dtype) for rank in range(n)]


def check_reductions(rank: int, n: int) -> None:
    for dtype in DTYPES:
        x = value(rank, 3, 5, dtype=dtype)
        dist.all_reduce(x)
        assert torch.equal(x, sum(everyone(n, 3, 5, dtype=dtype)).to(dtype)), dtype
    stacked = torch.stack(everyone(n, 4))
    for op, expected in (
        (dist.ReduceOp.MAX, stacked.amax(0)),
        (dist.ReduceOp.MIN, stacked.amin(0)),
        (dist.ReduceOp.PRODUCT, stacked.prod(0)),
    ):
        x = value(rank, 4)
        dist.all_reduce(x, op)
        assert torch.equal(x, expected), op
    flags = torch.tensor([rank == 0, False, True])
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    assert flags.tolist() == [True, False, True]
    # Added up in fp32: in bf16, 1 + n / 512 would be 1.
    x = torch.tensor([1.0 if rank == 0 else 2**-8], dtype=torch.bfloat16)
    dist.all_reduce(x)
    if dist.get_backend() == "colrow_mpi":
        assert x.item() == torch.tensor(1 + (n - 1) * 2**-8).bfloat16().item()
        mean = value(rank, 4)
        dist.all_reduce(mean, AVG)
        assert torch.allclose(mean, stacked.mean(0))
    transposed = value(rank, 3, 4).t()  # not contiguous
    dist.all_reduce(transposed)
    assert torch.equal(transposed, sum(everyone(n, 3, 4)).t())
    nothing = torch.empty(0)
    dist.all_reduce(nothing)
    root = value(rank, 4)
    dist.reduce(root, 1)
    assert rank != 1 or torch.equal(root, stacked.sum(0))
    for dtype in (torch.float32, torch.bfloat16):
        random = torch.randn(10_000, generator=torch.Generator().manual_seed(rank)).to(dtype)
        dist.all_reduce(random)
        bits: list[Tensor] = [torch.empty_like(random) for _ in range(n)]
        dist.all_gather(bits, random)
        assert all(torch.equal(bits[0], other) for other in bits)  # the same to the last bit


def check_narrow_sums(rank: int, n: int) -> None:
    """16-bit sums, whichever way they come and in whatever order they are waited for."""
    tp = colrow.ParallelGroup(dist.group.WORLD, rank, n)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = sum(everyone(n, 3, 4)).to(dtype)
        given = value(rank, 3, 4, dtype=dtype)
        kept = given.clone()
        assert torch.equal(primitives.all_reduce(given, tp), expected), dtype
        assert torch.equal(given, kept)
        primitives.all_reduce(given, tp, in_place=True)
        assert torch.equal(given, expected), dtype
        across = value(rank, 3, 4, dtype=dtype).t()
        dist.all_reduce(across)
        assert torch.equal(across, expected.t()), dtype
        dist.all_reduce(torch.empty(0, dtype=dtype))
        large = value(rank, 200_000, dtype=dtype)
        first, second = value(rank, 3, 4, dtype=dtype), value(rank, 5, dtype=dtype)
        works = [dist.all_reduce(x, async_op=True) for x in (large, first, second)]
        peer = rank ^ 1
        message, heard = value(rank, 4, dtype=dtype), torch.empty(4, dtype=dtype)
        if peer < n:  # between collectives that are under way
            sent = dist.isend(message, peer)
            dist.recv(heard, peer)
            sent.wait()
            assert torch.equal(heard, value(peer, 4, dtype=dtype))
        for work in reversed(works):
            work.wait()
        assert torch.equal(large, sum(everyone(n, 200_000)).to(dtype)), dtype
        assert torch.equal(first, expected)
        assert torch.equal(second, sum(everyone(n, 5)).to(dtype))


def check_gathers(rank: int, n: int) -> None:
    for dtype in DTYPES:
        out = torch.empty(n * 2, 3, dtype=dtype)
        compat.all_gather_single(out, value(rank, 2, 3, dtype=dtype))
        assert torch.equal(out, torch.cat(everyone(n, 2, 3, dtype=dtype)))
        whole = torch.cat(everyone(n, n * 2, dtype=dtype)).view(n, n * 2)
        mine = torch.empty(2, dtype=dtype)
        compat.reduce_scatter_single(mine, value(rank, n * 2, dtype=dtype))
        assert torch.equal(mine, whole.sum(0)[2 * rank : 2 * rank + 2].to(dtype))
    parts = [torch.empty(3) for _ in range(n)]
    dist.all_gather(parts, torch.full((3,), float(rank)))
    assert [part[0].item() for part in parts] == list(range(n))
    gathered = [torch.empty(2) for _ in range(n)] if rank == 0 else None
    dist.gather(torch.full((2,), float(rank)), gathered)
    assert gathered is None or [part[0].item() for part in gathered] == list(range(n))
    mine = torch.empty(2)
    dist.scatter(mine, [torch.full((2,), float(r)) for r in range(n)] if rank == 0 else None)
    assert mine.tolist() == [rank, rank]
    out = torch.empty(2)
    dist.reduce_scatter(out, [torch.full((2,), float(r + rank)) for r in range(n)])
    assert out[0].item() == sum(rank + other for other in range(n))
    x = value(rank, 4)
    dist.broadcast(x, n - 1)
    assert torch.equal(x, value(n - 1, 4))
    sent, received = torch.arange(float(n)) + 10 * rank, torch.empty(n)
    dist.all_to_all_single(received, sent)
    assert received.tolist() == [10 * other + rank for other in range(n)]
    sizes = [other + 1 for other in range(n)]
    received = torch.empty(n * (rank + 1))
    dist.all_to_all_single(received, torch.full((sum(sizes),), float(rank)), [rank + 1] * n, sizes)
    assert received.view(n, rank + 1)[:, 0].tolist() == list(range(n))


def check_messages_and_groups(rank: int, n: int) -> None:
    right, left = (rank + 1) % n, (rank - 1) % n
    incoming = torch.empty(5, dtype=torch.bfloat16)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, value(rank, 5, dtype=torch.bfloat16), right),
            dist.P2POp(dist.irecv, incoming, left),
        ]
    )
    for work in works:
        work.wait()
    assert torch.equal(incoming, value(left, 5, dtype=torch.bfloat16))
    if rank == 0:
        x = torch.empty(2)
        sources = {dist.recv(x) for _ in range(n - 1)}
        assert sources == set(range(1, n))
    else:
        dist.send(torch.ones(2), 0)
    objects: list[object] = [None] * n
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": other} for other in range(n)]
    pairs = [dist.new_group([0, other]) for other in range(1, n)]
    for other, group in enumerate(pairs, start=1):
        if rank in (0, other):
            x = torch.tensor([float(rank)])
            dist.all_reduce(x, group=group)
            assert x.item() == other
    alone = [dist.new_group([other]) for other in range(n)][rank]
    x = torch.ones(2)
    dist.all_reduce(x, group=alone)
    assert x.tolist() == [1, 1]
    # Two groups at once, waited for in another order than issued.
    a, b = torch.ones(100_000), torch.ones(7)
    group = dist.new_group(list(range(n)))
    first = dist.all_reduce(a, async_op=True)
    second = dist.all_reduce(b, group=group, async_op=True)
    assert first is not None and second is not None
    for work in (second, first) if rank else (first, second):
        work.wait()
    assert first.is_completed()
    assert a.sum() == n * 100_000 and b.sum() == 7 * n
    dist.barrier()


def check_primitives(rank: int, n: int) -> None:
    tp = colrow.ParallelGroup(dist.group.WORLD, rank, n)
    uneven = colrow.Partition.from_sizes([2 * other + 1 for other in range(n)])
    shard = torch.full((uneven.size(rank), 3), float(rank))
    whole = primitives.all_gather(shard, tp, 0, partition=uneven)
    assert torch.equal(
        whole[:, 0], torch.cat([torch.full((2 * r + 1,), float(r)) for r in range(n)])
    )
    mine = primitives.reduce_scatter(whole, tp, 0, partition=uneven)
    assert torch.equal(mine, n * shard)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def captured(x: Tensor) -> Tensor:
        return primitives.all_reduce(x, tp) + primitives.all_gather(x, tp, 0).sum()

    total = sum(everyone(n, 6))
    assert torch.equal(captured(value(rank, 6)), total + total.sum())


def check_data_parallel(rank: int, n: int) -> None:
    """DDP and FSDP2 against one process that sees all batches."""
    batches = [torch.randn(4, 6, generator=torch.Generator().manual_seed(r)) for r in range(n)]

    def make() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()

    reference = make()
    sum(reference(batch.double()).square().mean() for batch in batches).div(n).backward()
    replicated = DistributedDataParallel(make())
    replicated(batches[rank].double()).square().mean().backward()
    sharded = make()
    mesh = DeviceMesh("cpu", torch.arange(n))
    fully_shard(sharded, mesh=mesh)
    sharded(batches[rank].double()).square().mean().backward()
    for expected, ddp, fsdp in zip(
        reference.parameters(), replicated.parameters(), sharded.parameters(), strict=True
    ):
        assert isinstance(fsdp.grad, DTensor)
        assert torch.allclose(ddp.grad, expected.grad, rtol=1e-12)
        assert torch.allclose(fsdp.grad.full_tensor(), expected.grad, rtol=1e-12)


def check_dtensor_and_checkpoint(rank: int, n: int, directory: str) -> None:
    mesh = DeviceMesh("cpu", torch.arange(n))
    whole = torch.arange(35.0).view(7, 5)
    x = distribute_tensor(whole, mesh, [Shard(0)])
    assert torch.equal(x.full_tensor(), whole)
    assert torch.equal(x.redistribute(placements=[Shard(1)]).full_tensor(), whole)
    assert torch.equal((x @ x.T).redistribute(placements=[Replicate()]).to_local(), whole @ whole.T)
    dcp.save({"x": x}, checkpoint_id=directory)
    again = {"x": distribute_tensor(torch.zeros(7, 5), mesh, [Shard(1)])}
    dcp.load(again, checkpoint_id=directory)
    assert torch.equal(again["x"].full_tensor(), whole)


def check_pipeline(rank: int, n: int) -> None:
    """GPipe over n stages of one layer each, forward and backward, against all layers in a row."""
    torch.manual_seed(2)
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(n))).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    expected = layers(x)
    stage = PipelineStage(copy.deepcopy(layers[rank]), rank, n, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda y, target: (y * target).sum())
    if rank == 0:
        schedule.step(x)
    elif rank < n - 1:
        schedule.step()
    else:
        assert torch.allclose(schedule.step(target=torch.ones(4, 4)), expected, rtol=1e-12)
    (expected.sum() / 2).backward()  # the schedule averages over its microbatches
    mine = next(stage.submod.parameters()).grad
    assert mine is not None and layers[rank].weight.grad is not None
    assert torch.allclose(mine, layers[rank].weight.grad, rtol=1e-12)


def suite(engine: str, directory: str) -> None:
    mesh = colrow.init_mesh(tp=int(os.environ["WORLD_SIZE"]), device="cpu", engine=engine)
    rank, n = mesh.tp.rank, mesh.tp.size
    assert mesh.engine.name == engine == colrow.init_mesh(tp=n, engine=engine).engine.name
    with pytest.raises(ValueError, match="the process group was initialised before"):
        colrow.init_mesh(tp=n, engine={"gloo": "mpi", "mpi": "gloo"}[engine])
    torch.set_num_threads(1)
    check_reductions(rank, n)
    check_narrow_sums(rank, n)
    check_gathers(rank, n)
    check_messages_and_groups(rank, n)
    check_primitives(rank, n)
    check_data_parallel(rank, n)
    check_dtensor_and_checkpoint(rank, n, directory)
    check_pipeline(rank, n)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """MPI must leave nothing in shared memory; what was there before is somebody else's."""
    before = in_shared_memory()
    yield
    assert not left_in_shared_memory(before)


def in_shared_memory() -> set[str]:
    return {str(path) for path in Path("/dev/shm").glob("mpich_shm*")}


def left_in_shared_memory(before: set[str]) -> set[str]:
    """MPI's files there that no process has mapped; other tests may be using theirs meanwhile."""
    for _ in range(3):
        left = in_shared_memory() - before
        for maps in Path("/proc").glob("[0-9]*/maps"):
            try:
                left -= {line.split()[-1] for line in maps.read_text().splitlines() if line}
            except OSError:  # it has ended
                continue
        if not left:
            break
        time.sleep(1)  # one that has just been made will be mapped or gone
    return left


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("engine", ["gloo", "mpi"])
@pytest.mark.usefixtures("nothing_left")
def test_everything_that_is_asked_of_an_engine(engine: str, ranks: int, tmp_path: Path) -> None:
    launch(suite, (engine, str(tmp_path)), ranks=ranks, timeout_seconds=240)


@pytest.mark.parametrize("engine", ["gloo", "mpi"])
def test_a_collective_that_nobody_joins_ends_in_time(engine: str) -> None:
    with pytest.raises(RankFailure, match=r"(?i)rank 0 failed.*timed out"):
        launch(late, (engine,), ranks=2, timeout_seconds=100)


@pytest.mark.parametrize("engine", ["gloo", "mpi"])
@pytest.mark.usefixtures("nothing_left")
def test_a_killed_rank_ends_all(engine: str) -> None:
    with pytest.raises(RankFailure, match="rank 1 was killed by SIGKILL"):
        launch(dies, (engine,), ranks=2, timeout_seconds=100)


def test_which_engine_is_chosen_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(*arguments: Any) -> str:
        return choose_engine(*arguments).name

    assert name(None, "cpu", 1, 1, 2) == "none"
    assert name(None, "cpu", 2, 2, 2) == "mpi" == name("auto", "cpu", 2, 2, 2)
    assert name(None, "cpu", 4, 2, 2) == "gloo"  # several hosts
    assert name(None, "cuda", 2, 2, 2) == "nccl"
    assert name("gloo", "cuda", 2, 2, 2) == "gloo" == name("gloo", "cpu", 2, 2, 2)
    assert name("mpi", "cpu", 3, 3, 2) == "mpi"
    crowded = choose_engine(None, "cpu", 3, 3, 2)
    assert str(crowded) == "gloo (3 ranks on 2 cores: MPI's ranks wait by polling)"
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "SHARED_BYTES_PER_RANK", 1 << 50)
        small = choose_engine(None, "cpu", 2, 2, 2)
        assert small.name == "gloo"
        assert re.match(r"/dev/shm has [\d.]+ MB and MPI's 2 ranks need \d+ MB", small.why)
        with pytest.raises(ValueError, match=r"engine='mpi' is not possible: /dev/shm has"):
            choose_engine("mpi", "cpu", 2, 2, 2)
    for engine, device, ranks, local, message in (
        ("mpi", "cuda", 2, 2, "it serves CPU ranks alone"),
        ("mpi", "cpu", 4, 2, "the 4 ranks are on several hosts"),
        ("nccl", "cpu", 2, 2, "needs GPUs"),
        ("ucx", "cpu", 2, 2, "must be 'auto', 'mpi', 'gloo' or 'nccl'"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_engine(engine, device, ranks, local, 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = choose_engine(None, "cpu", 2, 2, 2)
    assert missing.name == "gloo" and "pip install 'colrow[cpu]'" in missing.why
