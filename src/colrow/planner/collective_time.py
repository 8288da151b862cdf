"""What crosses ranks and how long it takes: tensor, pipeline and data parallelism.

The tensor-parallel calls are those of :func:`colrow.models.communication.predict_step`, the same
that ``colrow comms`` compares with the recorded ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from colrow.comm.ledger import Call
from colrow.models.communication import predict_step
from colrow.planner.compute import Pass
from colrow.planner.hardware import Hardware
from colrow.planner.layout import DTYPE, Layout
from colrow.planner.model import ModelShape
from colrow.planner.placement import (
    all_to_all_seconds,
    collective_seconds,
    place,
    send_seconds,
)

# While NCCL moves data it occupies a share of the multiprocessors, by which a matmul beside it is
# slower: 15 % on A100 and H100 (calculon caa4b11, systems/, "processor_usage").
PROCESSOR_SHARE = 0.15
# Transformer Engine's overlapped reduce-scatter runs in this many chunks, of which the last has
# nothing left to hide behind (TransformerEngine d0067d0d, pipelined GEMM + reduce-scatter).
SCATTER_CHUNKS = 4
COLUMN_LAYERS = ("attention.qkv", "mlp.up", "head")


def tp_calls(model: ModelShape, layout: Layout) -> list[Call]:
    """Every tensor-parallel collective of one microbatch's forward and backward on one rank.

    Without pipelines and recomputation this is exactly what a run records.
    """
    return predict_step(
        model.config,
        model.division(layout.tp, layout.tp_weights),
        batch=layout.microbatch,
        sequence=layout.local_sequence,
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


@dataclass(frozen=True)
class CommunicationSeconds:
    """Time of collectives, and the part of it that computing waits for."""

    total: float = 0.0
    exposed: float = 0.0

    def __add__(self, other: CommunicationSeconds) -> CommunicationSeconds:
        return CommunicationSeconds(self.total + other.total, self.exposed + other.exposed)


NO_COMMUNICATION = CommunicationSeconds()


def exposed_seconds(traffic: float, room: float) -> float:
    """What is longer than the computation beside it, and that one's slowdown."""
    return max(0.0, traffic - room) + PROCESSOR_SHARE * min(traffic, room)


def tp_seconds(
    calls: tuple[Call, ...], phase: str, layout: Layout, hardware: Hardware, beside: Pass
) -> CommunicationSeconds:
    """Time of these calls in one phase, given the computation that can run beside them.

    What runs beside matmuls counts as :func:`exposed_seconds` says.
    """
    where, overlap = place("tp", layout, hardware), layout.program.tp_overlap
    total = hidden = exposed = 0.0
    for call in calls:
        if call.phase != phase:
            continue
        seconds = collective_seconds(call.op, call.bytes, where, hardware)
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
    exposed += exposed_seconds(hidden, room)
    return CommunicationSeconds(total, exposed)


def cp_seconds(
    model: ModelShape, layout: Layout, hardware: Hardware, phase: str, attention: float
) -> CommunicationSeconds:
    """Keys and values that pass round the context-parallel ranks of one block.

    Each rank's keys and values go once round forward; in backward they go again, and their
    gradients with them (Liu et al. 2023, arXiv 2310.01889, section 3). It runs beside attention.
    """
    if layout.cp == 1:
        return NO_COMMUNICATION
    division = model.division(layout.tp, layout.tp_weights)
    numbers = max(model.key_value_numbers(division, rank) for rank in range(layout.tp))
    whole = layout.microbatch * layout.sequence * numbers * layout.itemsize
    seconds = collective_seconds("all_gather", whole, place("cp", layout, hardware), hardware)
    if phase == "backward":
        seconds *= 2
    return CommunicationSeconds(seconds, exposed_seconds(seconds, attention))


def ep_seconds(
    model: ModelShape, layout: Layout, hardware: Hardware, phase: str
) -> CommunicationSeconds:
    """Tokens that travel to their experts and back in one block, once each way and phase.

    With full recomputation backward repeats forward's. Nothing runs beside it.
    """
    if layout.ep == 1 or model.experts == 1:
        return NO_COMMUNICATION
    rows = layout.tokens / (layout.tp if layout.sequence_parallel else 1)
    size = rows * model.active_experts * model.config.hidden_size * layout.itemsize
    where = place("ep", layout, hardware)
    times = 4 if phase == "backward" and layout.recompute == "full" else 2
    seconds = times * all_to_all_seconds(size, where, hardware)
    return CommunicationSeconds(seconds, seconds)


def stage_message_bytes(model: ModelShape, layout: Layout) -> float:
    """Bytes that one rank sends to the next stage for one microbatch."""
    tensor = layout.tokens * model.config.hidden_size * layout.itemsize
    divided = layout.sequence_parallel or layout.program.scatter_gather
    return tensor / layout.tp if divided else float(tensor)


def stage_seconds(model: ModelShape, layout: Layout, hardware: Hardware) -> float:
    """Time to hand one microbatch to the next stage, once, in one direction."""
    if layout.pp == 1:
        return 0.0
    size = stage_message_bytes(model, layout)
    seconds = send_seconds(size, place("pp", layout, hardware), hardware)
    if layout.tp > 1 and layout.program.scatter_gather and not layout.sequence_parallel:
        group = place("tp", layout, hardware)
        seconds += collective_seconds("all_gather", size * layout.tp, group, hardware)
    return seconds


def dp_collective_seconds(
    op: str, size: float, layout: Layout, hardware: Hardware, *, experts: bool = False
) -> float:
    """Time of one data-parallel collective over a whole buffer of ``size`` bytes.

    Args:
        experts: among the ranks that hold the same experts, and not among all replicas.
    """
    where = place("expert dp" if experts else "dp", layout, hardware)
    share = layout.program.zero3_adapter_share
    if layout.zero == 3 and share is not None and where.nodes > 1:
        where = replace(where, members=1)
        slower = replace(hardware.network, bandwidth=hardware.network.bandwidth * share)
        hardware = replace(hardware, network=slower)
    return collective_seconds(op, size, where, hardware)
