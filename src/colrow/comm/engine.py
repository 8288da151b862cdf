"""What carries the bytes between ranks: which engine, and why. Plain Python, no torch."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from typing import Literal

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


def available_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _against_mpi(device: str, ranks: int, local_ranks: int) -> str | None:
    if device != "cpu":
        return "it serves CPU ranks alone"
    if ranks != local_ranks:
        return f"the {ranks} ranks are on several hosts"
    if platform.system() != "Linux":
        return "it is made for Linux"
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed (pip install 'colrow[cpu]')"
    return None
