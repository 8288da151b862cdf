"""What carries the bytes between ranks: which engine, and why. Plain Python, no torch."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from typing import Literal

from colrow.launch import available_cores

SHARED_MEMORY = "/dev/shm"
# Measured with MPICH 5.0.2 and 2 to 4 ranks: 5.4 MB each, of MPI and of UCX.
SHARED_BYTES_PER_RANK = 6 << 20
EngineName = Literal["mpi", "gloo", "nccl", "none"]


@dataclass(frozen=True)
class Engine:
    """An engine and the reason for it.

    Attributes:
        name: "mpi" (MPI through shared memory), "gloo", "nccl", or "none" for a world of one.
        why: in a few words, for the start-up line.
    """

    name: EngineName
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def choose_engine(
    requested: str | None, device: str, ranks: int, local_ranks: int, cores: int | None = None
) -> Engine:
    """NCCL for GPUs; for CPU ranks MPI where it is fast and installed, Gloo elsewhere.

    Args:
        requested: "mpi", "gloo" or "nccl" to insist on one; None or "auto" to choose.
        device: "cpu" or "cuda".
        ranks, local_ranks: in all, and on this host.
        cores: that the local ranks may use; by default this process's.

    Raises:
        ValueError: an engine that does not exist, is not installed or cannot serve these ranks.
    """
    if ranks == 1 and requested in (None, "auto"):
        return Engine("none", "one rank")
    if requested not in (None, "auto", "mpi", "gloo", "nccl"):
        raise ValueError(f"engine={requested!r}: must be 'auto', 'mpi', 'gloo' or 'nccl'")
    if requested == "nccl" or (device == "cuda" and requested in (None, "auto")):
        if device != "cuda":
            raise ValueError("engine='nccl' needs GPUs: use 'mpi' or 'gloo' for CPU ranks")
        return Engine("nccl", "GPUs")
    if requested == "gloo":
        return Engine("gloo", "as asked for")
    against = _against_mpi(device, ranks, local_ranks)
    if requested == "mpi":
        if against is not None:
            raise ValueError(f"engine='mpi' is not possible: {against}")
        return Engine("mpi", "as asked for")
    cores = cores or available_cores()
    if against is None and local_ranks > cores:
        against = f"{local_ranks} ranks on {cores} cores: MPI's ranks wait by polling"
    if against is None:
        return Engine("mpi", "shared memory of one host")
    return Engine("gloo", against)


def _against_mpi(device: str, ranks: int, local_ranks: int) -> str | None:
    if device != "cpu":
        return "it serves CPU ranks alone"
    if ranks != local_ranks:
        return f"the {ranks} ranks are on several hosts"
    if platform.system() != "Linux":
        return "it is made for Linux"
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed (pip install 'colrow[cpu]')"
    return against_shared_memory(ranks, free=False)


def against_shared_memory(ranks: int, *, free: bool) -> str | None:
    """Why MPI's shared memory would not fit; a process that runs out of it is killed (SIGBUS).

    Args:
        ranks: on this host.
        free: asks for what is free now; else for the whole, which all ranks see alike.
    """
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return f"there is no {SHARED_MEMORY}"
    has = status.f_frsize * (status.f_bavail if free else status.f_blocks)
    needed = ranks * SHARED_BYTES_PER_RANK
    if has >= needed:
        return None
    return (
        f"{SHARED_MEMORY} has {has / 1e6:.1f} MB{' free' if free else ''} and MPI's {ranks} ranks "
        f"need {needed / 1e6:.0f} MB (in a container: --shm-size {max(64, 2 * needed >> 20)}m)"
    )
