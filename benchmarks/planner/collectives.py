"""Predicted against measured all-reduces: ``python -m benchmarks.planner.collectives``."""

from __future__ import annotations

from statistics import mean

from benchmarks.planner.published import read_table
from colrow.planner.data import read_table as planner_table
from colrow.planner.hardware import find_hardware
from colrow.planner.placement import GroupPlace, collective_seconds

# V100's table has 22 GB/s between two devices, so they had no switch.
_MACHINES = {"a100": "a100-80gb", "v100": "v100-32gb-mesh"}
_MEBIBYTE = 1 << 20


def node_errors() -> dict[tuple[str, int, bool], list[float]]:
    """Relative errors inside a node by (GPU, ranks, whether the curve has this size)."""
    found: dict[tuple[str, int, bool], list[float]] = {}
    for row in read_table("vtrain_nccl_allreduce_lut"):
        size, ranks = int(row["bytes"]), int(row["n_gpus"])
        link = find_hardware(_MACHINES[row["gpu"]]).link
        on_curve = (size // _MEBIBYTE).bit_count() == 1
        predicted = link.collective_seconds("all_reduce", size, ranks)
        error = predicted / (float(row["time_us"]) * 1e-6) - 1
        found.setdefault((row["gpu"], ranks, on_curve), []).append(error)
    return found


def network_errors() -> dict[str, list[float]]:
    """Relative errors of 256 MB between nodes of the EFA cluster, by operation."""
    hardware, size = find_hardware("h100-efa"), 256.0 * _MEBIBYTE
    found: dict[str, list[float]] = {}
    for row in planner_table("nccl_busbw"):
        nodes = row["nodes"]
        if not row["gpu"].startswith("H100 (HF") or nodes == "1":
            continue
        ranks, op = int(row["gpus"]), row["collective"]
        where = GroupPlace(ranks, int(nodes), 8, int(nodes) - 1)
        factor = (2 if op == "all_reduce" else 1) * (ranks - 1) / ranks
        measured = size * factor / (float(row["busbw_GBps"]) * 1e9)
        error = collective_seconds(op, size, where, hardware) / measured - 1
        found.setdefault(op, []).append(error)
    return found


def main() -> None:
    """Prints mean and largest error of each table."""
    for (gpu, ranks, on_curve), errors in node_errors().items():
        which = "sizes of the curve" if on_curve else "sizes between them"
        print(f"{gpu}, {ranks} ranks, {which}: {_of(errors)}")
    for op, errors in network_errors().items():
        print(f"EFA, {op}, 2 to 64 nodes: {_of(errors)}")


def _of(errors: list[float]) -> str:
    sizes = [abs(error) for error in errors]
    return f"{len(errors)} rows, mean {100 * mean(sizes):.1f} %, largest {100 * max(sizes):.1f} %"


if __name__ == "__main__":
    main()
