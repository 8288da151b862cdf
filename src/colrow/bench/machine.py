"""What the planner wants to know of a machine, measured: matmuls, memory, launches, links.

All ranks measure at the same time, as they run in a step, and the slowest counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F

from colrow.bench.link import Curve
from colrow.bench.timing import time_rounds
from colrow.comm.mesh import Mesh

# [rows, inner, columns] of matmuls as a step has them, and smaller and larger ones.
_MATMULS = (
    (256, 128, 256),
    (1024, 256, 512),
    (1024, 512, 704),
    (1024, 512, 2048),
    (2048, 1024, 2048),
)
_MATMULS_OF_GPUS = ((4096, 4096, 4096), (8192, 8192, 8192))
_STREAM_NUMBERS = 2**22
_LAUNCHES = 100
# The operations that a machine file takes.
_PLANNED = ("all_reduce", "all_gather", "reduce_scatter")


def machine_file(
    mesh: Mesh,
    curves: Sequence[Curve],
    *,
    name: str = "this machine",
    seconds_each: float = 0.3,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, object]:
    """What ``colrow plan --machine`` reads (see :mod:`colrow.planner.machine_file`).

    Measures one rank's device; the links are those of ``curves``. Every rank gets the same.

    Args:
        name: of the machine.
        seconds_each: how long to measure one matmul, or whatever else.
        progress: told what is being measured.
    """
    progress("measuring matmuls and memory")
    return {
        "name": name,
        "devices_per_node": mesh.world_size,
        "device": _device(mesh, seconds_each),
        "link": [
            {
                "op": curve.op,
                "ranks": curve.ranks,
                "message_bytes": list(curve.message_bytes),
                "seconds": list(curve.seconds),
            }
            for curve in curves
            if curve.op in _PLANNED
        ],
    }


def _device(mesh: Mesh, seconds_each: float) -> dict[str, object]:
    def seconds(call: Callable[[], object]) -> float:
        return median(time_rounds(call, mesh, seconds=seconds_each))

    def matmul(shape: tuple[int, int, int], dtype: torch.dtype) -> list[float]:
        rows, inner, columns = shape
        x = torch.randn(rows, inner, device=mesh.device, dtype=dtype)
        weight = torch.randn(columns, inner, device=mesh.device, dtype=dtype)
        return [2 * rows * inner * columns, seconds(lambda: x @ weight.t())]

    shapes = _MATMULS + (_MATMULS_OF_GPUS if mesh.device.type == "cuda" else ())
    fp32 = [matmul(shape, torch.float32) for shape in shapes]
    bf16 = matmul(shapes[-1], torch.bfloat16)
    # A step's elementwise work is partly limited by memory (additions), partly by computing
    # (exponentials): three bytes moved for the one, two for the other, per byte of the tensor.
    big = torch.randn(_STREAM_NUMBERS, device=mesh.device)
    out = torch.empty_like(big)
    stream = seconds(lambda: (torch.add(big, out, out=out), F.silu(big)))
    small = torch.randn(16, device=mesh.device)
    launches = seconds(lambda: [small * 2 for _ in range(_LAUNCHES)]) / _LAUNCHES
    return {
        "memory_gigabytes": _memory_bytes(mesh) / 1e9,
        "memory_gigabytes_per_second": 5 * out.nbytes / stream / 1e9,
        "peak_teraflops": {
            "fp32": max(flops / took for flops, took in fp32) / 1e12,
            "bf16": bf16[0] / bf16[1] / 1e12,
        },
        "stream_fraction": 1.0,
        "cpu": mesh.device.type == "cpu",
        "kernel_microseconds": launches * 1e6,
        "matmul": fp32,
    }


def _memory_bytes(mesh: Mesh) -> float:
    """Of one rank: its GPU's, or its share of the host's."""
    if mesh.device.type == "cuda":
        return float(torch.cuda.get_device_properties(mesh.device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / mesh.world_size
