"""Starts the ranks of this host when nobody else did.

Importing this module does not import torch: the command line needs it before it knows whether
there is anything to compute.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from colrow.launch.environment import rank_environment
from colrow.launch.errors import debugging

T = TypeVar("T")


def launch(
    function: Callable[..., T],
    args: Sequence[object] = (),
    *,
    ranks: int,
    threads_per_rank: int | None = None,
    max_restarts: int = 0,
    timeout_seconds: float | None = None,
    seconds_to_stop: float = 5,
    hang_seconds: float | None = None,
) -> list[T]:
    """Runs ``function(*args)`` in ``ranks`` processes of this host and returns their results.

    The processes are started ("spawn") and watched by torchrun's agent; each calls ``function``
    with the environment that :func:`colrow.init_mesh` reads. Everything listens on loopback only.
    One rank needs no process: the function is called here. Ranks keep the host memory that they
    free for their next step (glibc's MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_), unless the
    environment says something of MALLOC_*, GLIBC_TUNABLES or LD_PRELOAD.

    Args:
        function: importable by name, or defined in the script that runs.
        args: its positional arguments, which can be pickled, as can its result.
        ranks: number of processes.
        threads_per_rank: OMP_NUM_THREADS of the ranks unless the environment sets it; by default
            this process's cores divided by the ranks.
        max_restarts: how many times all ranks are started again after one failed.
        timeout_seconds: after which the ranks are stopped, restarts included; None waits for ever.
        seconds_to_stop: how long ranks that handle SIGINT or SIGTERM may go on, to save what they
            have, when this process gets one. When a rank failed, the others have 5 seconds.
        hang_seconds: after how long a rank whose process is stopped (SIGSTOP) counts as failed;
            after 30 seconds, or half of that, a line on standard error says for which rank the
            others wait and where it is. None watches neither; a collective then ends the wait,
            after the timeout of :func:`colrow.init_mesh`.

    Returns:
        The results, by rank.

    Raises:
        RankFailure: when a rank raised or died; the others are stopped first. With one rank the
            function's own exception comes through.
        TimeoutError: when ``timeout_seconds`` passed.
        ValueError: when ``ranks`` is below 1 or ``function`` cannot be sent to a process.
        RuntimeError: when this process is itself a rank of some launcher.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: at least 1 is needed")
    if threads_per_rank is not None and threads_per_rank < 1:
        raise ValueError(f"threads_per_rank={threads_per_rank}: at least 1 is needed")
    if ranks == 1:
        return [function(*args)]
    environment = rank_environment()
    if environment is not None:
        raise RuntimeError(
            f"this process is already rank {environment.rank} of {environment.world_size}, "
            f"started by {environment.launcher}: call {function.__name__} directly"
            f"{environment.remedy}"
        )
    users = os.environ.get("OMP_NUM_THREADS", "")
    if users and not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", users):
        raise ValueError(
            f"the environment variable OMP_NUM_THREADS is {users!r}: set it to a number of threads "
            "for each rank, or unset it"
        )
    from colrow.launch.agent import run_ranks

    threads = threads_per_rank or max(1, available_cores() // ranks)
    return run_ranks(
        function,
        tuple(args),
        ranks=ranks,
        threads=os.environ.get("OMP_NUM_THREADS") or str(threads),
        max_restarts=max_restarts,
        timeout_seconds=timeout_seconds,
        seconds_to_stop=seconds_to_stop,
        hang_seconds=hang_seconds,
        quiet=not debugging(),
    )


def available_cores() -> int:
    """How many of this machine this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
