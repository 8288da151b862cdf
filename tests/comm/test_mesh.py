from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from colrow import ParallelGroup, init_mesh, reduce_from_tp
from tests.layers.dense import raises
from tests.ranks import RankPool, run_world


def describe(tp: ParallelGroup, sizes: dict[str, int]) -> dict[str, tuple[int, int, list[int]]]:
    """Rank, size and world ranks of each of this process's groups."""
    mesh = init_mesh(**sizes)
    assert mesh.world_size == dist.get_world_size()
    assert mesh.device_mesh is not None and mesh.device_mesh.mesh_dim_names == ("pp", "dp", "tp")
    assert mesh.device == torch.device("cpu")
    found = {}
    for handle in (mesh.tp, mesh.dp, mesh.pp):
        assert handle.group is not None and handle.ledger is None
        members = dist.get_process_group_ranks(handle.group)
        found[handle.name] = (handle.rank, handle.size, members)
    total = reduce_from_tp(torch.tensor(float(dist.get_rank())), mesh.tp)
    assert total == sum(found["tp"][2])
    return found


@pytest.mark.parametrize(
    ("sizes", "tp_groups", "dp_groups", "pp_groups"),
    [
        ({"tp": 4}, [[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0], [1], [2], [3]]),
        ({"tp": 2}, [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]]),
        ({"tp": 2, "pp": 2}, [[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]]),
        ({"pp": 2, "dp": 2}, [[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]]),
        ({}, [[0], [1], [2], [3]], [[0, 1, 2, 3]], [[0], [1], [2], [3]]),
    ],
)
def test_the_grid_has_tp_innermost_and_pp_outermost(
    ranks: RankPool,
    sizes: dict[str, int],
    tp_groups: list[list[int]],
    dp_groups: list[list[int]],
    pp_groups: list[list[int]],
) -> None:
    groups = {"tp": tp_groups, "dp": dp_groups, "pp": pp_groups}
    for world_rank, found in enumerate(ranks(4, describe, sizes)):
        for name, (rank, size, members) in found.items():
            assert members in groups[name] and members[rank] == world_rank
            assert size == len(members)


def refuse(tp: ParallelGroup) -> None:
    with raises(ValueError, "4 ranks", "tp=3 x pp=1 x dp", "not a multiple of 3"):
        init_mesh(tp=3)
    with raises(ValueError, "tp=2 x pp=3", "not a multiple of 6"):
        init_mesh(tp=2, pp=3)
    with raises(ValueError, "tp=2 x pp=1 x dp=1 needs 2 ranks, but 4 were started"):
        init_mesh(tp=2, dp=1)
    with raises(ValueError, "tp=2 x pp=2 x dp=2 needs 8 ranks, but 4 were started"):
        init_mesh(tp=2, pp=2, dp=2)


@pytest.mark.parametrize("fails", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_script_that_ends_leaves_its_process_group(fails: bool) -> None:
    """Under a launcher as well; after an exception the rank ends at once, whatever is open."""
    script = (
        "import atexit, colrow, torch.distributed as dist\n"
        "atexit.register(lambda: print(dist.is_initialized()))\n"
        "colrow.init_mesh(tp=2, engine='gloo')\n" + "1 / 0\n" * fails
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert said == [f"{fails}\n"] * 2
    assert [rank.returncode for rank in ranks] == [int(fails)] * 2


def test_a_world_that_does_not_factor_is_refused(ranks: RankPool) -> None:
    ranks(4, refuse)


@contextmanager
def host(name: str) -> Iterator[None]:
    os.environ["SLURMD_NODENAME"] = name
    try:
        yield
    finally:
        del os.environ["SLURMD_NODENAME"]


def warnings_of(tp: ParallelGroup, sizes: dict[str, int], hosts: list[str]) -> list[str]:
    with host(hosts[tp.rank]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        init_mesh(**sizes)
    return [str(warning.message) for warning in caught if "spans" in str(warning.message)]


def test_a_tp_group_that_spans_hosts_gets_one_warning(ranks: RankPool) -> None:
    two_hosts = ["left", "left", "right", "right"]
    first, *others = ranks(4, warnings_of, {"tp": 4}, two_hosts)
    assert others == [[], [], []]
    (message,) = first
    assert "ranks 0-3 spans the hosts left, right" in message
    assert "cross the network" in message and "10 times slower" in message
    assert ranks(4, warnings_of, {"tp": 2}, two_hosts) == [[]] * 4
    assert ranks(4, warnings_of, {"tp": 4}, ["left"] * 4) == [[]] * 4
    (later,) = ranks(4, warnings_of, {"tp": 2}, ["left", "left", "left", "right"])[0]
    assert "ranks 2-3 spans the hosts left, right" in later


def test_without_a_launcher_the_world_is_one() -> None:
    mesh = init_mesh()
    assert not dist.is_initialized()
    assert mesh.world_size == 1 and mesh.device_mesh is None
    for name in ("tp", "dp", "pp"):
        handle = getattr(mesh, name)
        assert (handle.group, handle.rank, handle.size, handle.name) == (None, 0, 1, name)
    assert init_mesh(tp=1, pp=1, dp=1, device="cpu").device == torch.device("cpu")
    with pytest.raises(
        ValueError, match=r"1 rank cannot be arranged as tp=2.*torchrun --nproc-per-node 2"
    ):
        init_mesh(tp=2)
    with pytest.raises(ValueError, match="engine='ucx': must be"):
        init_mesh(engine="ucx")
    with pytest.raises(ValueError, match="tp=1 x pp=1 x dp=2 needs 2 ranks, but 1 was started"):
        init_mesh(dp=2)
    for sizes in ({"tp": 0}, {"pp": -1}, {"dp": 0}):
        ((name, size),) = sizes.items()
        with pytest.raises(ValueError, match=f"{name}={size}: the size .* at least 1"):
            init_mesh(**sizes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="device cuda: torch sees no CUDA device"):
        init_mesh(device="cuda")


class Stop(Exception):
    """The process group would be made now."""


@pytest.mark.parametrize(("before", "expected"), [(None, "1"), ("0", "0")])
def test_collectives_of_gpus_are_asked_to_go_first(
    monkeypatch: pytest.MonkeyPatch, before: str | None, expected: str
) -> None:
    """torch reads the variable while it makes a group: it must be there by then."""
    seen: list[str | None] = []

    def make_group(*_: object, **__: object) -> None:
        seen.append(os.environ.get("TORCH_NCCL_HIGH_PRIORITY"))
        raise Stop

    monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", before or "")
    if before is None:
        monkeypatch.delenv("TORCH_NCCL_HIGH_PRIORITY")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr("colrow.comm.mesh._choose_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr("colrow.comm.mesh.rendezvous_arguments", lambda *_: {})
    monkeypatch.setattr("torch.distributed.init_process_group", make_group)
    with pytest.raises(Stop):
        init_mesh(tp=2, engine="nccl")
    assert seen == [expected]


def test_impossible_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="tp rank 2 is not below the size 2"):
        ParallelGroup(None, 2, 2)
    with pytest.raises(ValueError, match="dp rank -1"):
        ParallelGroup(None, -1, 1, "dp")
    with pytest.raises(ValueError, match="a tp group of 2 ranks needs a process group"):
        ParallelGroup(None, 0, 2)


def started_by_a_launcher() -> list[int]:
    mesh = init_mesh(tp=2)
    total = reduce_from_tp(torch.tensor(mesh.tp.rank + 1), mesh.tp)
    return [mesh.tp.rank, mesh.tp.size, mesh.dp.size, int(total)]


def test_reads_the_launchers_ranks() -> None:
    assert run_world(2, started_by_a_launcher) == [[0, 2, 1, 3], [1, 2, 1, 3]]
