"""What crosses ranks and how long it takes: tensor, pipeline and data parallelism.

The tensor-parallel calls are those of :func:`colrow.models.communication.predict_step`, the same
that ``colrow comms`` compares with the recorded ledger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from colrow.comm.ledger import Call
from colrow.models.communication import predict_step
from colrow.planner.compute import Pass
from colrow.planner.hardware import Hardware
from colrow.planner.layout import DTYPE, Layout
from colrow.planner.links import Link, wire_factor
from colrow.planner.model import ModelShape

# While NCCL moves data it occupies a share of the multiprocessors, by which a matmul beside it is
# slower: 15 % on A100 and H100 (calculon caa4b11, systems/, "processor_usage").
PROCESSOR_SHARE = 0.15
# Transformer Engine's overlapped reduce-scatter runs in this many chunks, of which the last has
# nothing left to hide behind (TransformerEngine d0067d0d, pipelined GEMM + reduce-scatter).
SCATTER_CHUNKS = 4
# ZeRO-3 across nodes: block by block, rings reach this share of one adapter's bandwidth per GPU.
# Calibrated on the 174.6B rows of Narayanan et al. 2021, Table 2, where one and two sequences per
# GPU take equally long: 67 s for three times 349 GB of weights.
ZERO3_ADAPTER_SHARE = 0.68
COLUMN_LAYERS = ("attention.qkv", "mlp.up", "head")


def tp_calls(model: ModelShape, layout: Layout) -> list[Call]:
    """Every tensor-parallel collective of one microbatch's forward and backward on one rank.

    Without pipelines and recomputation this is exactly what a run records.
    """
    return predict_step(
        model.config,
        model.division(layout.tp, layout.tp_weights),
        batch=layout.microbatch,
        sequence=layout.sequence,
        sequence_parallel=layout.sequence_parallel,
        keep_gathered_input=layout.program.keep_gathered_input,
        dtype=DTYPE[layout.precision],
    )


@dataclass(frozen=True)
class Collectives:
    """A microbatch's tensor-parallel calls by place."""

    block: tuple[Call, ...]
    embedding: tuple[Call, ...]
    head: tuple[Call, ...]
    once: tuple[Call, ...]


@lru_cache(maxsize=4096)
def collectives(model: ModelShape, layout: Layout) -> Collectives:
    """The calls of one block and of the rest; all blocks are alike, so one is predicted."""
    config = replace(model.config, num_layers=1, windows=())
    calls = tp_calls(replace(model, config=config), layout)
    if layout.recompute == "full":
        # Backward runs the block's forward again, and with it the forward's calls.
        calls += [
            replace(call, phase="backward", layer=f"{call.layer} again")
            for call in calls
            if call.phase == "forward" and call.layer.startswith("blocks.")
        ]
    place: dict[str, list[Call]] = {"blocks": [], "embedding": [], "head": [], "loss": []}
    once: list[Call] = []
    for call in calls:
        place.get(call.layer.split(".")[0], once).append(call)
    return Collectives(
        tuple(place["blocks"]),
        tuple(place["embedding"]),
        tuple(place["head"] + place["loss"]),
        tuple(once),
    )


def tp_link(layout: Layout, hardware: Hardware) -> Link:
    """The link that a tensor-parallel group uses: the node's, unless the group is larger."""
    return hardware.link if layout.tp <= hardware.devices_per_node else hardware.network


@dataclass(frozen=True)
class CommunicationSeconds:
    """Time of collectives, and the part of it that computing waits for."""

    total: float = 0.0
    exposed: float = 0.0

    def __add__(self, other: CommunicationSeconds) -> CommunicationSeconds:
        return CommunicationSeconds(self.total + other.total, self.exposed + other.exposed)


def tp_seconds(
    calls: tuple[Call, ...], phase: str, layout: Layout, hardware: Hardware, beside: Pass
) -> CommunicationSeconds:
    """Time of these calls in one phase, given the computation that can run beside them.

    Exposed is what is longer than the matmul beside it, plus the matmul's slowdown
    (:data:`PROCESSOR_SHARE`).
    """
    link, overlap = tp_link(layout, hardware), layout.program.tp_overlap
    total = hidden = exposed = 0.0
    for call in calls:
        if call.phase != phase:
            continue
        seconds = link.collective_seconds(call.op, call.bytes, layout.tp)
        total += seconds
        column = call.layer.removeprefix("blocks.0.") in COLUMN_LAYERS
        if overlap == "full" and call.dtype != "int64":
            chunks = SCATTER_CHUNKS if call.op == "reduce_scatter" else layout.tp
            exposed += seconds / chunks
            hidden += seconds * (1 - 1 / chunks)
        elif overlap != "none" and phase == "backward" and column:
            hidden += seconds
        else:
            exposed += seconds
    if phase == "backward" and overlap != "full":
        room = beside.backward.weight_gradients
    else:
        room = (beside.forward if phase == "forward" else beside.backward).matmul
    exposed += max(0.0, hidden - room) + PROCESSOR_SHARE * min(hidden, room)
    return CommunicationSeconds(total, exposed)


def stage_message_bytes(model: ModelShape, layout: Layout) -> float:
    """Bytes that one rank sends to the next stage for one microbatch."""
    tensor = layout.microbatch * layout.sequence * model.config.hidden_size * layout.itemsize
    divided = layout.sequence_parallel or layout.program.scatter_gather
    return tensor / layout.tp if divided else float(tensor)


def stage_seconds(model: ModelShape, layout: Layout, hardware: Hardware) -> float:
    """Time to hand one microbatch to the next stage, once, in one direction."""
    if layout.pp == 1:
        return 0.0
    size = stage_message_bytes(model, layout)
    inside = layout.tp * layout.pp <= hardware.devices_per_node
    link = hardware.link if inside else hardware.network
    seconds = link.send_seconds(size)
    if layout.tp > 1 and layout.program.scatter_gather and not layout.sequence_parallel:
        seconds += hardware.link.collective_seconds("all_gather", size * layout.tp, layout.tp)
    return seconds


def dp_nodes(layout: Layout, hardware: Hardware) -> int:
    """Nodes over which one data-parallel group is spread.

    Ranks are numbered with tp innermost, then dp, then pp.
    """
    members = max(1, hardware.devices_per_node // layout.tp)
    return -(-layout.dp // members)


def dp_collective_seconds(op: str, size: float, layout: Layout, hardware: Hardware) -> float:
    """Time of one data-parallel collective over a whole buffer of ``size`` bytes.

    Inside a node by the node's link. Across nodes a group with several members in a node uses the
    adapters of all of them, up to the speed of the node's link; the ring passes every rank, a
    tree (all-reduce only) every node once up and once down.
    """
    ranks, nodes = layout.dp, dp_nodes(layout, hardware)
    if ranks < 2 or size <= 0:
        return 0.0
    if nodes == 1:
        return hardware.link.collective_seconds(op, size, ranks)
    network, passes = hardware.network, 2 if op == "all_reduce" else 1
    members = min(ranks, max(1, hardware.devices_per_node // layout.tp))
    bandwidth = min(members * network.bandwidth, hardware.link.bandwidth)
    if layout.zero == 3:
        bandwidth = min(bandwidth, network.bandwidth * ZERO3_ADAPTER_SHARE)
    steps = passes * (nodes * network.hop_seconds + (ranks - nodes) * hardware.link.hop_seconds)
    if op == "all_reduce":
        steps = min(steps, 2 * math.ceil(math.log2(nodes)) * network.hop_seconds)
    return network.latency_seconds + steps + size * wire_factor(op, ranks) / bandwidth
