"""Brings MPI up in ranks that were started by anybody, mpiexec or not."""

from __future__ import annotations

import atexit
import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from colrow.comm.engine import against_shared_memory
from colrow.comm.mpi import BACKEND
from colrow.comm.mpi.peers import Peers
from colrow.launch.environment import inherited_environment
from colrow.launch.signals import handlers_kept

if TYPE_CHECKING:
    from mpi4py import MPI

# Messages go through MPI's shared memory, but it also opens a way over the network, for ranks of
# other hosts, of which there are none: UCX (MPICH) and libfabric (MPICH, Intel MPI) would listen on
# every interface. libfabric's own shared memory would outlive a rank that is killed.
_NO_NETWORK = {
    "FI_PROVIDER": "tcp",
    "FI_TCP_IFACE": "lo",
    "I_MPI_FABRICS": "shm",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,vader",
}
_UCX_SHARED_MEMORY = {"self", "shm", "sm", "mm", "posix", "sysv", "cma", "xpmem", "knem"}
_servers: list[subprocess.Popen[str]] = []


def installed() -> bool:
    """Whether mpi4py and an MPI library are there; imports neither."""
    return importlib.util.find_spec("mpi4py") is not None


def register() -> None:
    """Makes the backend known to torch.distributed; a second time does nothing."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


def _create(options: Any, _: object) -> dist.ProcessGroup:
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    communicator = _communicator(options.store, options.group_rank, options.group_size, ranks)
    from colrow.comm.mpi.process_group import MpiGroup  # starts MPI where it is imported first

    return MpiGroup(options.group_rank, communicator, options.timeout, ranks, _peers())


def started() -> bool:
    """Whether MPI runs in this process."""
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and bool(module.Is_initialized())


def _communicator(store: Store, rank: int, size: int, ranks: list[int]) -> MPI.Intracomm:
    """The communicator of these global ranks; starts MPI when the first group is made.

    Args:
        store: of the group that is made, which its ranks share.
        rank, size: this process in that group.
        ranks: the group's global ranks.

    Raises:
        RuntimeError: when MPI has another number of ranks than torch.distributed.
    """
    if not started():
        _start(store, rank, size)
    mpi = _mpi()
    world: MPI.Intracomm = mpi.COMM_WORLD
    if max(ranks) >= world.size:
        raise RuntimeError(
            f"MPI runs {world.size} ranks in this process, torch.distributed {max(ranks) + 1}: "
            "start all ranks with one launcher, or use engine='gloo'"
        )
    if len(ranks) == world.size:
        whole: MPI.Intracomm = world.Dup()
        return whole
    members = world.group.Incl(ranks)
    return world.Create_group(members, tag=sum(1 << (r % 14) for r in ranks))


def _start(store: Store, rank: int, size: int) -> None:
    """MPI_Init; the ranks find each other through mpiexec's server or through our own."""
    own = "PMI_RANK" not in os.environ and "PMIX_RANK" not in os.environ
    import mpi4py

    # MPI_Finalize waits for all ranks. A rank that failed must not: it ends, and is noticed.
    mpi4py.rc.finalize = False
    variables = dict(_NO_NETWORK)
    if not _UCX_SHARED_MEMORY.issuperset(os.environ.get("UCX_TLS", "none").split(",")):
        variables["UCX_TLS"] = "self,sm"
    if own:
        # torchrun's ranks keep the store when they are started again.
        key = f"colrow/pmi_port/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if rank == 0:  # which looks before any rank takes its share
            store.set(key, against_shared_memory(size, free=True) or str(_serve(size)))
        port = store.get(key).decode()
        if not port.isdecimal():
            raise ValueError(f"MPI cannot start: {port}; free some, or use engine='gloo'")
        variables |= {"PMI_PORT": f"127.0.0.1:{port}", "PMI_ID": str(rank)}
    # The variables are not for the processes that this one will start.
    with inherited_environment(variables), handlers_kept():
        mpi = _mpi()
    mpi.COMM_WORLD.Barrier()  # all ranks have opened the shared memory
    _forget_shared_memory()
    if not own:
        atexit.register(_finalize, mpi)


def _forget_shared_memory() -> None:
    """Removes the names of MPI's shared memory, so that it ends with the last rank.

    MPI would remove them in MPI_Finalize, which a rank that was killed never reaches.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    names = {line.split()[-1] for line in maps.read_text().splitlines() if "mpich_shm" in line}
    for name in names:
        Path(name).unlink(missing_ok=True)


def _mpi() -> Any:
    from mpi4py import MPI

    return MPI


@cache
def _peers() -> Peers:
    return Peers(_mpi().COMM_WORLD)


def _serve(size: int) -> int:
    """Starts the server as a process: this one is about to block in MPI_Init."""
    server = subprocess.Popen(
        [sys.executable, "-m", "colrow.comm.mpi.pmi", str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # a terminal's Ctrl-C is not for it: it ends with its standard input
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise RuntimeError("the server through which MPI's ranks find each other did not start")
    _servers.append(server)
    atexit.register(_stop, server)
    return int(line)


def _stop(server: subprocess.Popen[str]) -> None:
    server.kill()  # its standard input may be open in processes that this one forked
    server.wait()


def _finalize(mpi: ModuleType) -> None:
    """mpiexec takes a rank that ends without it for a failed one, which is right after an error."""
    if not hasattr(sys, "last_value"):
        mpi.Finalize()
