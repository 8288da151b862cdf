"""Who is who: the (pp, dp, tp) grid of ranks."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from colrow.comm import compat
from colrow.comm.engine import Engine, EngineName, choose_engine
from colrow.comm.group import ParallelGroup
from colrow.comm.mpi import BACKEND
from colrow.launch.environment import rank_environment
from colrow.launch.rendezvous import rendezvous_arguments

_ALONE = Engine("none", "one rank")


@dataclass(frozen=True)
class Mesh:
    """The grid of ranks; tp is innermost, so that it stays inside a host.

    Attributes:
        tp, dp, pp: this rank's group along each dimension.
        device_mesh: the same grid for torch (dimensions "pp", "dp", "tp"); None in a world of one
            that has no process group.
        device: where this rank computes.
        engine: what carries the bytes, and why it was chosen.
        ends: the first and the last rank along pp, on these two; None on the others and without
            pipeline parallelism.
    """

    tp: ParallelGroup
    dp: ParallelGroup
    pp: ParallelGroup
    device_mesh: DeviceMesh | None
    device: torch.device
    engine: Engine = _ALONE
    ends: ParallelGroup | None = None

    @property
    def groups(self) -> tuple[ParallelGroup, ...]:
        """All handles of this rank, for :func:`colrow.record`."""
        return (self.tp, self.dp, self.pp, *([] if self.ends is None else [self.ends]))

    @property
    def world_size(self) -> int:
        """Number of ranks in the grid."""
        return self.tp.size * self.dp.size * self.pp.size

    def limit_waits(self, timeout: timedelta) -> None:
        """Sets how long a collective of any group of this mesh waits for a rank from now on."""
        for group in {self.world.group, *(handle.group for handle in self.groups)} - {None}:
            assert group is not None
            _limit_waits(group, timeout)

    @property
    def world(self) -> ParallelGroup:
        """All ranks of the grid."""
        for group in (self.tp, self.dp, self.pp):
            if group.size == self.world_size:
                return ParallelGroup(group.group, group.rank, group.size, "world")
        return ParallelGroup(dist.group.WORLD, dist.get_rank(), self.world_size, "world")


def init_mesh(
    tp: int = 1,
    pp: int = 1,
    dp: int | None = None,
    *,
    device: str | torch.device | None = None,
    engine: str | None = None,
    timeout: timedelta = timedelta(minutes=10),
) -> Mesh:
    """Arranges the ranks that torchrun, mpiexec, srun or :func:`colrow.launch` started in a grid.

    Without a launcher this is a world of one. An already initialised process group is used as it
    is.

    Args:
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        dp: data-parallel size; by default what is left of the world.
        device: "cpu", "cuda" or "cuda:N"; by default CUDA when there is one GPU per local rank.
            With ``engine="gloo"`` more local ranks than GPUs share them, for tests: Gloo carries
            their tensors through the host's memory. NCCL's streams get high priority
            (TORCH_NCCL_HIGH_PRIORITY=1) unless the environment says otherwise.
        engine: "mpi", "gloo" or "nccl"; by default NCCL for GPUs, for CPU ranks of one host MPI
            when the ``cpu`` extra is installed and each rank has a core, and Gloo otherwise.
        timeout: how long a collective waits for a rank before it gives up.

    Raises:
        ValueError: when a size is below 1 or tp x pp x dp is not the number of ranks; for a device
            that torch does not know or see, or more local ranks than GPUs; when the launcher's
            environment contradicts itself or does not say where the ranks meet, or the port there
            is taken; for another engine than that of a process group that is there already.
        torch.distributed.DistError: when ranks do not appear within ``timeout``.

    Warns:
        UserWarning: on rank 0 of the world, when a tp group spans hosts.

    Communicates: initialises the process group and one group for each dimension, and with more than
    two pipeline stages one for the ends of each pipeline; all ranks must call it. On several hosts
    the ranks also exchange the hosts' names.
    """
    for name, size in (("tp", tp), ("pp", pp), ("dp", dp)):
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}: the size of a mesh dimension is at least 1")
    environment = rank_environment()
    if dist.is_initialized():
        world = dist.get_world_size()
    else:
        world = environment.world_size if environment else 1
    dp = _data_parallel_size(world, tp, pp, dp)
    local_rank = environment.local_rank if environment else 0
    local_world = environment.local_world_size if environment else 1
    chosen = _choose_device(device, engine, local_rank, local_world)
    if world == 1 and not dist.is_initialized():
        choose_engine(engine, chosen.type, 1, 1)  # one that does not exist is refused here too
        alone = ParallelGroup.single
        return Mesh(alone("tp"), alone("dp"), alone("pp"), device_mesh=None, device=chosen)
    if chosen.type == "cuda":
        # Collectives have streams of NCCL's own; with high priority their blocks are scheduled as
        # soon as they can, also behind matmuls that are queued already (CUDA_DEVICE_MAX_CONNECTIONS
        # has no say). torch reads this when it makes a group.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    if dist.is_initialized():
        carrier = _engine_in_use(engine, chosen)
    else:
        carrier = choose_engine(engine, chosen.type, world, local_world)
        dist.init_process_group(_backend(carrier), timeout=timeout, **rendezvous_arguments())
        if carrier.name == "gloo":
            atexit.register(_leave)
    grid = torch.arange(world, device="cpu").view(pp, dp, tp)
    # Where torch sees GPUs, some of its versions would give these groups NCCL.
    same = (("gloo", None),) * 3 if carrier.name == "gloo" and chosen.type == "cuda" else None
    device_mesh = DeviceMesh(
        chosen.type, grid, mesh_dim_names=("pp", "dp", "tp"), backend_override=same
    )
    for name in ("pp", "dp", "tp"):  # torch gives them its own default, half an hour
        if device_mesh.get_group(name) is not dist.group.WORLD:
            _limit_waits(device_mesh.get_group(name), timeout)
    _warn_if_tp_spans_hosts(tp, local_world)

    def handle(name: str) -> ParallelGroup:
        group = device_mesh.get_group(name)
        size = dist.get_world_size(group)
        return ParallelGroup(group, dist.get_rank(group), size, name)

    stages = handle("pp")
    ends = _pipeline_ends(grid, stages, timeout)
    return Mesh(handle("tp"), handle("dp"), stages, device_mesh, chosen, carrier, ends)


def _limit_waits(group: dist.ProcessGroup, timeout: timedelta) -> None:
    if dist.get_backend(group) == BACKEND:
        group.limit_waits(timeout)  # type: ignore[attr-defined]
    else:
        compat.set_timeout(timeout, group)


def _leave() -> None:
    """Ends Gloo's threads before C++ tears them down, which aborts some of the ranks.

    Not behind an exception: a collective that is still open would be waited for, and the launcher
    would not hear of the failure.
    """
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        dist.destroy_process_group()


def _pipeline_ends(
    grid: torch.Tensor, pp: ParallelGroup, timeout: timedelta
) -> ParallelGroup | None:
    """The group of the first and the last rank of this rank's pipeline; all ranks take part."""
    if pp.size <= 2:
        return pp if pp.size == 2 else None
    found = None
    for first, last in zip(grid[0].flatten().tolist(), grid[-1].flatten().tolist(), strict=True):
        group = dist.new_group([first, last], timeout=timeout)
        if dist.get_rank() in (first, last):
            found = ParallelGroup(group, int(dist.get_rank() == last), 2, "pp")
    return found


def _backend(engine: Engine) -> str:
    """torch.distributed's name of an engine."""
    if engine.name == "nccl":
        return "cpu:gloo,cuda:nccl"
    if engine.name == "mpi":
        from colrow.comm.mpi.start import register

        register()
        return BACKEND
    return "gloo"


def _engine_in_use(requested: str | None, device: torch.device) -> Engine:
    backend = dist.get_backend()
    wanted = None if requested in (None, "auto") else requested
    if wanted is not None and wanted not in dist.get_backend_config():
        raise ValueError(
            f"engine={wanted!r}: the process group was initialised before, with the backend "
            f"{backend}; initialise it with that engine, or leave the engine out"
        )
    names: dict[str, EngineName] = {"gloo": "gloo", "nccl": "nccl", BACKEND: "mpi"}
    by_device = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    carrier = by_device.get(device.type, backend)
    return Engine(names.get(carrier, "none"), f"the process group's backend is {backend}")


def _data_parallel_size(world: int, tp: int, pp: int, dp: int | None) -> int:
    if dp is None:
        if world % (tp * pp):
            raise ValueError(
                f"{world} rank{'s' * (world > 1)} cannot be arranged as tp={tp} x pp={pp} x dp: "
                f"{world} is not a multiple of {tp * pp}; start a multiple of {tp * pp} ranks "
                f"(torchrun --nproc-per-node {tp * pp} SCRIPT) or change tp or pp"
            )
        return world // (tp * pp)
    if tp * pp * dp != world:
        raise ValueError(
            f"tp={tp} x pp={pp} x dp={dp} needs {tp * pp * dp} ranks, but {world} "
            f"{'was' if world == 1 else 'were'} started"
        )
    return dp


def _choose_device(
    device: str | torch.device | None, engine: str | None, local_rank: int, local_world: int
) -> torch.device:
    if device is None:
        enough = torch.cuda.is_available() and torch.cuda.device_count() >= local_world
        device = "cuda" if enough else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: use cpu, cuda or cuda:N") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device}: torch sees no CUDA device here; use cpu")
        if chosen.index is None:
            gpus = torch.cuda.device_count()
            if local_rank >= gpus and engine != "gloo":
                raise ValueError(
                    f"local rank {local_rank} has no GPU: {gpus} GPUs for {local_world} ranks on "
                    "this host; start fewer ranks, or let them share GPUs with engine='gloo'"
                )
            chosen = torch.device("cuda", local_rank % gpus)
        torch.cuda.set_device(chosen)
    return chosen


def _warn_if_tp_spans_hosts(tp: int, local_world: int) -> None:
    """Every layer's collectives then cross the network; rank 0 of the world says so once."""
    if tp == 1 or dist.get_world_size() <= local_world:
        return
    hosts: list[str | None] = [None] * dist.get_world_size()
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    dist.all_gather_object(hosts, name)
    spanning = [
        (first, sorted({str(host) for host in hosts[first : first + tp]}))
        for first in range(0, len(hosts), tp)
        if len(set(hosts[first : first + tp])) > 1
    ]
    if spanning and dist.get_rank() == 0:
        first, names = spanning[0]
        warnings.warn(
            f"the tensor-parallel group of ranks {first}-{first + tp - 1} spans the hosts "
            f"{', '.join(names)}: every layer's 4 collectives per step then cross the network, "
            "which is often 10 times slower than the links inside a host; prefer tp up to "
            f"{local_world} (the ranks per host) with pp or dp across hosts",
            stacklevel=3,
        )
