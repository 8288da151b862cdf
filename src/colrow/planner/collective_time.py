"""What crosses ranks and how long it takes: tensor, pipeline and data parallelism.

The tensor-parallel calls are those of :func:`colrow.models.communication.predict_step`, the same
that ``colrow comms`` compares with the recorded ledger.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypedDict

from colrow.comm.ledger import Call
from colrow.layers.describe import BlockSpec, ExpertsSpec
from colrow.models.communication import predict_stage, predict_step
from colrow.models.stages import Stage
from colrow.planner.hardware import Hardware
from colrow.planner.layout import DTYPE, Layout
from colrow.planner.links import PIECE_BYTES
from colrow.planner.model import ModelShape, key_value_numbers
from colrow.planner.passes import Pass
from colrow.planner.placement import (
    all_to_all_seconds,
    collective_seconds,
    job_nodes,
    place,
    send_seconds,
)

# While NCCL moves data it occupies a share of the multiprocessors, by which a matmul beside it is
# slower: 15 % on A100 and H100 (calculon caa4b11, systems/, "processor_usage").
PROCESSOR_SHARE = 0.15
# Transformer Engine's overlapped reduce-scatter runs in this many chunks, of which the last has
# nothing left to hide behind (TransformerEngine d0067d0d, pipelined GEMM + reduce-scatter).
SCATTER_CHUNKS = 4


def tp_calls(model: ModelShape, layout: Layout) -> list[Call]:
    """Every tensor-parallel collective of one microbatch's forward and backward on one rank.

    Without pipelines and recomputation this is exactly what a run records.
    """
    division = model.division(layout.tp, layout.tp_weights)
    return predict_step(model.config, division, **_step(layout))


class _Step(TypedDict):
    batch: int
    sequence: int
    sequence_parallel: bool
    keep_gathered_input: bool
    dtype: str


def _step(layout: Layout) -> _Step:
    return {
        "batch": layout.microbatch,
        "sequence": layout.local_sequence,
        "sequence_parallel": layout.sequence_parallel,
        "keep_gathered_input": layout.program.keep_gathered_input,
        "dtype": DTYPE[layout.precision],
    }


@dataclass(frozen=True)
class Collectives:
    """A microbatch's tensor-parallel calls by place.

    Attributes:
        block, embedding, head: the calls of one block and of the ends.
        columns: names of layers whose gradient is summed while their weights' is computed.
    """

    block: tuple[Call, ...]
    embedding: tuple[Call, ...]
    head: tuple[Call, ...]
    columns: frozenset[str]


@lru_cache(maxsize=4096)
def collectives(model: ModelShape, block: BlockSpec, layout: Layout) -> Collectives:
    """The calls of one block of this kind and of the ends."""
    calls = predict_stage(
        replace(model.config, blocks=(block,)),
        layout.division,
        Stage(0, 1, 0, 1),
        shared="later",
        **_step(layout),
    )
    if layout.recompute == "full":
        # Backward runs the block's forward again, and with it the forward's calls.
        calls += [
            replace(call, phase="backward", layer=f"{call.layer} again")
            for call in calls
            if call.phase == "forward" and call.layer.startswith("blocks.")
        ]
    places: dict[str, list[Call]] = {"blocks": [], "embedding": [], "head": [], "loss": []}
    for call in calls:
        if (name := call.layer.split(".")[0]) in places:
            places[name].append(call)
    columns = {f"blocks.0.{sent.layer}" for sent in block.exchanges() if sent.kind == "column"}
    return Collectives(
        tuple(places["blocks"]),
        tuple(places["embedding"]),
        tuple(places["head"] + places["loss"]),
        frozenset({*columns, "head"}),
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
    calls: tuple[Call, ...],
    columns: Set[str],
    phase: str,
    layout: Layout,
    hardware: Hardware,
    beside: Pass,
) -> CommunicationSeconds:
    """Time of these calls in one phase, given the computation that can run beside them.

    What runs beside matmuls counts as :func:`exposed_seconds` says.

    Args:
        columns: see :class:`Collectives`.
    """
    where, overlap = place("tp", layout, hardware), layout.program.tp_overlap
    total = hidden = exposed = 0.0
    for call in calls:
        if call.phase != phase:
            continue
        narrow = layout.precision == "fp8" and layout.program.narrow_gathers
        size = call.bytes / layout.itemsize if narrow and call.op == "all_gather" else call.bytes
        seconds = collective_seconds(call.op, size, where, hardware)
        total += seconds
        if overlap == "full" and call.dtype != "int64":
            chunks = SCATTER_CHUNKS if call.op == "reduce_scatter" else layout.tp
            exposed += seconds / chunks
            hidden += seconds * (1 - 1 / chunks)
        elif overlap != "none" and phase == "backward" and call.layer in columns:
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
    block: BlockSpec, layout: Layout, hardware: Hardware, phase: str, attention: float
) -> CommunicationSeconds:
    """Keys and values that pass round the context-parallel ranks of one block.

    Each rank's keys and values go once round forward; in backward they go again, and their
    gradients with them (Liu et al. 2023, arXiv 2310.01889, section 3). It runs beside attention.
    """
    if layout.cp == 1:
        return NO_COMMUNICATION
    numbers = max(
        key_value_numbers(block.attention, layout.division, rank) for rank in range(layout.tp)
    )
    whole = layout.microbatch * layout.sequence * numbers * layout.itemsize
    seconds = collective_seconds("all_gather", whole, place("cp", layout, hardware), hardware)
    if phase == "backward":
        seconds *= 2
    return CommunicationSeconds(seconds, exposed_seconds(seconds, attention))


def ep_seconds(
    block: BlockSpec, layout: Layout, hardware: Hardware, phase: str
) -> CommunicationSeconds:
    """Tokens that travel to their experts and back in one block, once each way and phase.

    With full recomputation backward repeats forward's. Nothing runs beside it.
    """
    if layout.ep == 1 or not isinstance(block.mlp, ExpertsSpec):
        return NO_COMMUNICATION
    rows = layout.tokens / (layout.tp if layout.sequence_parallel else 1)
    copies: float = block.mlp.active
    if layout.program.dispatch_once:  # on how many ranks so many experts are, expected
        copies = layout.ep * (1 - (1 - 1 / layout.ep) ** copies)
    size = rows * copies * block.hidden_size * layout.itemsize
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
    where = place("pp", layout, hardware)
    seconds = send_seconds(size, where, hardware)
    if where.boundaries:
        wait = hardware.network.stage_wait_seconds(job_nodes(layout, hardware))
        seconds += wait * (2 if layout.pp > 2 else 1)  # a middle stage has two neighbours
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
    # A network that is slow to go round is measured by pieces of the buffers that are reduced.
    pieces = max(1.0, size / PIECE_BYTES) if hardware.network.is_shared else 1.0
    return pieces * collective_seconds(op, size / pieces, where, hardware)
