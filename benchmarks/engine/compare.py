"""Gloo against the MPI engine, between two ranks of this machine.

``python -m benchmarks.engine.compare [FILE]`` prints a table, and writes all samples to FILE.
Three ways in: torch.distributed over Gloo, torch.distributed over the engine, and colrow's own
primitives over it; and, as the limit, mpi4py's all-reduce on the same communicator. Each message
size is measured in turns, and the median of all calls is reported with its spread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

import colrow
from benchmarks.engine.report import write_report
from colrow.comm import primitives
from colrow.launch import launch

SIZES = {4 << 10: 300, 64 << 10: 200, 1 << 20: 60, 16 << 20: 12}
ROUNDS = 5


def measure(engine: str) -> dict[str, dict[int, list[float]]]:
    """Seconds of each call, by way and message size, on rank 0's clock."""
    mesh = colrow.init_mesh(tp=2, device="cpu", engine=engine)
    torch.set_num_threads(1)
    buffers = {size: torch.ones(size // 4) for size in SIZES}

    def through_torch(x: torch.Tensor) -> None:
        dist.all_reduce(x, group=mesh.tp.group)

    def through_colrow(x: torch.Tensor) -> None:
        primitives.all_reduce(x, mesh.tp, in_place=True)

    ways: dict[str, Callable[[torch.Tensor], None]] = {
        f"torch.distributed over {engine}": through_torch,
        f"colrow over {engine}": through_colrow,
    }
    if engine == "mpi":
        from mpi4py import MPI

        def raw(x: torch.Tensor) -> None:
            MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, x.numpy())

        ways["mpi4py alone"] = raw
    found: dict[str, dict[int, list[float]]] = {way: {} for way in ways}
    for _ in range(ROUNDS):
        for size, repeats in SIZES.items():
            for way, call in ways.items():
                dist.barrier()
                samples = found[way].setdefault(size, [])
                for _ in range(repeats):
                    started = time.perf_counter()
                    call(buffers[size])
                    samples.append(time.perf_counter() - started)
                buffers[size].fill_(1)
    return found


def main() -> None:
    results: dict[str, dict[int, list[float]]] = {}
    for _ in range(2):
        for engine in ("gloo", "mpi"):
            for way, by_size in launch(measure, (engine,), ranks=2, threads_per_rank=1)[0].items():
                for size, samples in by_size.items():
                    results.setdefault(way, {}).setdefault(size, []).extend(samples)
    print(f"{'all-reduce, two ranks':32}" + "".join(f"{size >> 10:>16} KiB" for size in SIZES))
    summary = {}
    for way, by_size in results.items():
        cells = []
        for size, samples in by_size.items():
            low, median, high = statistics.quantiles(samples, n=4)
            summary[f"{way}, {size} bytes"] = {"median": median, "quartiles": [low, high]}
            cells.append(f"{median * 1e6:9.1f} us {size / median / 1e9:4.1f} GB/s")
        print(f"{way:32}" + "".join(f"{cell:>20}" for cell in cells))
    if len(sys.argv) > 1:
        write_report(
            sys.argv[1],
            "python -m benchmarks.engine.compare FILE",
            summary,
            results,
        )


if __name__ == "__main__":
    main()
