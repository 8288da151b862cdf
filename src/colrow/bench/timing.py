"""Times a call on all ranks at once: rounds of repetitions, the slowest rank of each round."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from colrow.comm import primitives
from colrow.comm.mesh import Mesh

ROUNDS = 7
_MOST_REPEATS = 2000
# The first calls allocate, connect and touch pages.
_WARM_UP = 3


def time_rounds(call: Callable[[], object], mesh: Mesh, *, seconds: float) -> tuple[float, ...]:
    """Seconds of one call in each of ROUNDS rounds, on the slowest rank of ``mesh.tp``.

    The ranks start each round together. A round has as many calls as fit its share of the time.

    Args:
        call: the same on all ranks; may contain collectives.
        seconds: how long all rounds together should take.

    Communicates: a barrier before each round; two all-reduces of the times.
    """
    for _ in range(_WARM_UP):
        call()
    estimate = _slowest([_round(call, _WARM_UP, mesh)], mesh)[0]
    repeats = max(1, min(_MOST_REPEATS, int(seconds / ROUNDS / max(estimate, 1e-9))))
    return tuple(_slowest([_round(call, repeats, mesh) for _ in range(ROUNDS)], mesh))


def _round(call: Callable[[], object], repeats: int, mesh: Mesh) -> float:
    if mesh.tp.group is not None:
        dist.barrier(group=mesh.tp.group)
    _finish(mesh.device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    _finish(mesh.device)
    return (time.perf_counter() - started) / repeats


def _slowest(seconds: list[float], mesh: Mesh) -> list[float]:
    mine = torch.tensor(seconds, dtype=torch.float64, device=mesh.device)
    slowest: list[float] = primitives.all_reduce(mine, mesh.tp, op="max").tolist()
    return slowest


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
