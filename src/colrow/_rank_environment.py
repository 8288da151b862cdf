"""Which rank this process is, who started it, and where the ranks meet.

Importing this module does not import torch.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# Where the ranks that launch() started meet: a file in a directory of their own.
STORE_VARIABLE = "COLROW_STORE"
_DEFAULT_PORT = 29500
# glibc returns large blocks to the system as soon as they are free, which hands them out again page
# by page, zeroed: some 5 % of a training step. These ranks keep them, at their largest size so far.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
# Slurm gives the shells of salloc and sbatch step numbers too; they are not srun's ranks.
_FIRST_SPECIAL_SLURM_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class RankEnvironment:
    """This process's place among the ranks, as its launcher wrote it into the environment.

    Attributes:
        launcher: "colrow", "torchrun", "mpiexec" or "srun".
        rank: this process's number among all ranks.
        world_size: number of ranks on all hosts.
        local_rank: this process's number among the ranks of its host.
        local_world_size: number of ranks on its host.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def __post_init__(self) -> None:
        for what, number, size in (
            ("rank", self.rank, self.world_size),
            ("local rank", self.local_rank, self.local_world_size),
        ):
            if not 0 <= number < size:
                raise ValueError(
                    f"{self.launcher}'s environment says {what} {number} of {size}: "
                    f"a {what} is at least 0 and below the number of ranks"
                )


def launched_by() -> str | None:
    """The launcher whose rank this process is, None when nobody started ranks.

    Returns:
        "colrow" (:func:`colrow.launch.launch`), "torchrun", "mpiexec", "srun" or None.
    """
    environment = rank_environment()
    return environment.launcher if environment else None


def rank_environment() -> RankEnvironment | None:
    """Reads what the launcher of this process wrote into the environment.

    Known are :func:`colrow.launch.launch`, torchrun (RANK, WORLD_SIZE), Open MPI
    (OMPI_COMM_WORLD_*), MPICH and Intel MPI (PMI_*, MPI_LOCAL*) and Slurm's srun (SLURM_PROCID and
    the step's variables). The shell of an ``salloc`` or ``sbatch`` is not a rank, nor is a step of
    one task.

    Raises:
        ValueError: when a variable is not a number, a rank is out of range, or the launcher does
            not say which ranks share this host.
    """
    if _has("RANK", "WORLD_SIZE"):
        launcher = "colrow" if _has(STORE_VARIABLE) else "torchrun"
        rank, size = _number("RANK"), _number("WORLD_SIZE")
        # Both are always set by torchrun; set by hand, the pair alone means one host.
        local_rank = _number("LOCAL_RANK") if _has("LOCAL_RANK") else rank
        local_size = _number("LOCAL_WORLD_SIZE") if _has("LOCAL_WORLD_SIZE") else size
        return RankEnvironment(launcher, rank, size, local_rank, local_size)
    if _has("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        return RankEnvironment(
            "mpiexec",
            _number("OMPI_COMM_WORLD_RANK"),
            _number("OMPI_COMM_WORLD_SIZE"),
            *_local("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        )
    slurm = _slurm_environment()
    if _has("PMI_RANK", "PMI_SIZE"):
        rank, size = _number("PMI_RANK"), _number("PMI_SIZE")
        # srun sets PMI_* as well; an mpiexec inside a Slurm job gives its ranks other numbers.
        if slurm and (slurm.rank, slurm.world_size) == (rank, size):
            return slurm
        local_names = ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")
        if _has("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"):
            local_names = ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
        return RankEnvironment("mpiexec", rank, size, *_local(*local_names))
    return slurm


def allocator_variables() -> dict[str, str]:
    """What the environment of a rank says to glibc's allocator.

    Nothing where the user says something already (MALLOC_*, GLIBC_TUNABLES or LD_PRELOAD).
    """
    names = (name for name in os.environ if os.environ[name])
    if any(n.startswith("MALLOC_") or n in ("GLIBC_TUNABLES", "LD_PRELOAD") for n in names):
        return {}
    return dict(_KEEP_FREED_MEMORY)


def rendezvous_arguments() -> dict[str, Any]:
    """The keyword arguments with which this rank meets the others.

    ``torch.distributed.init_process_group(backend, **rendezvous_arguments())``. Ranks of
    :func:`colrow.launch.launch` meet in a file; torchrun's through its own store; those of mpiexec
    and srun at MASTER_ADDR:MASTER_PORT, by default on this host's loopback address. Where all
    ranks were started on this host by colrow, or by mpiexec or srun without a MASTER_ADDR, Gloo
    and NCCL are kept on the loopback interface, unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME
    says otherwise.

    Raises:
        RuntimeError: when nobody started ranks.
        ValueError: when ranks on several hosts were not told where to meet, or the port is taken.
    """
    environment = rank_environment()
    if environment is None:
        raise RuntimeError("this process is not a rank: no launcher's environment was found")
    rank, size = environment.rank, environment.world_size
    if environment.launcher == "colrow":
        from torch.distributed import FileStore  # type: ignore[attr-defined]

        stay_on_loopback()
        store = FileStore(os.environ[STORE_VARIABLE], size)
        return {"store": store, "rank": rank, "world_size": size}
    if environment.launcher == "torchrun":
        if not _has("MASTER_ADDR", "MASTER_PORT"):
            raise ValueError(
                "RANK and WORLD_SIZE are set, MASTER_ADDR and MASTER_PORT are not: set them to "
                "rank 0's address and a free port, or start the ranks with torchrun"
            )
        return {"init_method": "env://"}
    port = _number("MASTER_PORT") if _has("MASTER_PORT") else _DEFAULT_PORT
    if _has("MASTER_ADDR"):
        address = os.environ["MASTER_ADDR"]
        host = f"[{address}]" if ":" in address else address
        return {"init_method": f"tcp://{host}:{port}", "rank": rank, "world_size": size}
    if environment.local_world_size < size:
        raise ValueError(
            f"{environment.launcher} started {size} ranks on several hosts "
            f"({environment.local_world_size} on this one): set MASTER_ADDR to the address of the "
            "host of rank 0, the same on all ranks"
        )
    stay_on_loopback()
    return {"store": _loopback_store(port, rank, size), "rank": rank, "world_size": size}


def _has(*names: str) -> bool:
    return all(os.environ.get(name) for name in names)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(
            f"the environment variable {name} is {os.environ[name]!r}, not a whole number"
        ) from None


def _local(rank_name: str, size_name: str) -> tuple[int, int]:
    if not _has(rank_name, size_name):
        rank_name, size_name = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    if not _has(rank_name, size_name):
        raise ValueError(
            "this mpiexec does not tell which ranks share a host: set LOCAL_RANK and "
            "LOCAL_WORLD_SIZE for each rank"
        )
    return _number(rank_name), _number(size_name)


def _slurm_environment() -> RankEnvironment | None:
    if not _has("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_LOCALID"):
        return None
    if _number("SLURM_STEP_ID") >= _FIRST_SPECIAL_SLURM_STEP:
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if _has("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    size = _number(tasks) if _has(tasks) else 1
    if size == 1:
        return None
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or str(size)
    node = _number("SLURM_NODEID") if _has("SLURM_NODEID") else 0
    local_size = _tasks_of_node(per_node, node)
    return RankEnvironment(
        "srun", _number("SLURM_PROCID"), size, _number("SLURM_LOCALID"), local_size
    )


def _tasks_of_node(per_node: str, node: int) -> int:
    """The ``node``-th number of Slurm's run-length list: "4(x2),3" is 4, 4, 3."""
    counts: list[int] = []
    try:
        for item in per_node.split(","):
            tasks, _, times = item.partition("(x")
            counts += [int(tasks)] * int(times.rstrip(")") or 1)
        return counts[node]
    except (ValueError, IndexError):
        raise ValueError(
            f"SLURM_STEP_TASKS_PER_NODE is {per_node!r}, which has no number of tasks for the "
            f"node {node}"
        ) from None


def stay_on_loopback() -> None:
    """Makes Gloo and NCCL listen on loopback only, unless the environment names an interface."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


def _loopback_store(port: int, rank: int, size: int) -> Store:
    """A TCPStore of which rank 0 listens on the loopback address alone; torch's own on all."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if rank > 0:
        return TCPStore("127.0.0.1", port, size, is_master=False)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"rank 0 cannot listen on port {port} of this host ({error.strerror}): set MASTER_PORT "
            "to a free port, the same on all ranks"
        ) from None
    listener.listen()
    return TCPStore("127.0.0.1", port, size, is_master=True, master_listen_fd=listener.detach())
