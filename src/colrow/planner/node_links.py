"""Links of the built-in nodes and clusters, from published benchmarks of collectives."""

from __future__ import annotations

import math
from functools import cache

from colrow.planner.data import read_table
from colrow.planner.links import PIECE_BYTES, ByNodes, Curve, Link, wire_factor

# What NCCL's own cost model assumes for one more inter-node or intra-node step of a ring (Simple
# protocol), and for starting: NVIDIA/nccl 5067397c, src/graph/tuning.cc, hwLat and baseLat.
NETWORK_HOP_SECONDS = 14.0e-6
NODE_HOP_SECONDS = 3.4e-6
COLLECTIVE_START_SECONDS = 8.4e-6
# Best all-reduce bus bandwidth over one adapter and its data sheet: 24 of 25 GB/s (200 Gbit/s) and
# 48 of 50 GB/s (400 Gbit/s), NVIDIA GTC24 S62129.
NETWORK_FRACTION = 0.96
# Bus bandwidth of A100's measured all-reduce, from which those of other rings follow.
_MEASURED_RING = 235e9
# From Hopper on all-reduce among more than 4 ranks runs in the switch (NVLS), with curves of its
# own: H200's and B200's rows of 4 ranks are alike with and without it.
_SWITCHES = {"h100": ("H200", "NVLS"), "h200": ("H200", "NVLS"), "b200": ("B200", "default")}
_RING_RANKS = 4
# A message between stages on 64 nodes of that cluster: fitted to the playbook's 61 rows with
# pipelines on 512 GPUs, which lie within 22 % of it. Their microbatches take 0.55 s (2 stages, two
# messages each) to 0.95 s (4 and more, four messages) longer than on fewer nodes, whatever is
# computed. Up to 16 nodes most runs show nothing of it; on 32 about half of them do.
_STAGE_WAITS: ByNodes = ((32, 0.0), (64, 0.25))


def node_link(kind: str, peak: float) -> Link:
    """The link inside a node, from measured all-reduces (nccl-tests).

    A ring was measured on A100; a link that is k times as fast moves k times the bytes in the same
    time. Gathers and scatters are rings everywhere.

    Args:
        kind: of devices.csv.
        peak: bytes per second of a ring.
    """
    if kind == "v100-mesh":
        curves = tuple((ranks, _curve("V100 (vTrain)", ranks)) for ranks in (2, 8))
        split, source = curves, "VIA-Research/vTrain f8dda84, NCCL all-reduce on V100"
    else:
        scale = peak / _MEASURED_RING
        split = tuple(
            (ranks, tuple((size * scale, speed * scale) for size, speed in _a100(ranks)))
            for ranks in (2, 8)
        )
        curves = split
        source = (
            "nccl-tests, stas00/ml-engineering 744d01e network; VIA-Research/vTrain f8dda84; "
            "peaks NVIDIA GTC24 S62129"
        )
        if kind in _SWITCHES:
            gpu, algorithm = _SWITCHES[kind]
            switch = _curve(gpu, 8, algorithm)
            curves = (split[0], (_RING_RANKS, split[1][1]), (8, switch))
    return Link(
        peak,
        COLLECTIVE_START_SECONDS,
        NODE_HOP_SECONDS,
        curves=curves,
        split_curves=split,
        source=source,
    )


def network_link(adapter_gigabits: float, adapters_per_device: float) -> Link:
    """A device's share of its node's adapters."""
    return Link(
        adapter_gigabits / 8 * 1e9 * adapters_per_device * NETWORK_FRACTION,
        COLLECTIVE_START_SECONDS,
        NETWORK_HOP_SECONDS,
        source=f"{adapter_gigabits:g} Gbit/s adapters; NVIDIA GTC24 S62129; NCCL tuning.cc",
    )


def efa_link(network: Link, inside: Link) -> Link:
    """The same adapters on Amazon's EFA, where collectives slow down with the nodes.

    What the way round the nodes takes is that of Hugging Face's H100 cluster: collectives of 256 MB
    over 2 to 64 nodes (ultrascale playbook, pp_comm_bandwidth), less the time of their bytes.
    """
    bandwidth = min(8 * network.bandwidth, inside.bandwidth)
    rounds: dict[str, dict[int, float]] = {}
    for row in read_table("nccl_busbw"):
        if not row["gpu"].startswith("H100 (HF") or row["nodes"] == "1":
            continue
        op, nodes = row["collective"], int(row["nodes"])
        slowness = 1 / (float(row["busbw_GBps"]) * 1e9) - 1 / bandwidth
        waits = max(0.0, PIECE_BYTES * wire_factor(op, 8 * nodes) * slowness)
        rounds.setdefault(op, {})[nodes] = waits
    return Link(
        network.bandwidth,
        network.latency_seconds,
        network.hop_seconds,
        rounds=tuple((op, tuple(sorted(points.items()))) for op, points in rounds.items()),
        stage_waits=_STAGE_WAITS,
        source=f"{network.source}; EFA: ultrascale playbook",
    )


def _a100(ranks: int) -> Curve:
    """Eight ranks were measured on two machines; where both have a size, their mean counts."""
    found = dict(_curve("A100 (vTrain)", ranks))
    for size, speed in _curve("A100", ranks):
        found[size] = math.sqrt(speed * found.get(size, speed))
    return tuple(sorted(found.items()))


@cache
def _curve(gpu: str, ranks: int, algorithm: str = "") -> Curve:
    points = {
        _bytes(row["size"]): float(row["busbw_GBps"]) * 1e9
        for row in read_table("nccl_busbw")
        if (row["gpu"], row["algo"], row["nodes"], row["gpus"]) == (gpu, algorithm, "1", str(ranks))
        and row["collective"] == "all_reduce"
        and row["size"] != "peak"
    }
    return tuple(sorted(points.items()))


def _bytes(text: str) -> float:
    return float(text[:-1]) * float(1 << {"K": 10, "M": 20, "G": 30}[text[-1]])
