"""The memory of every rank of a training layout, by what it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from colrow.layers.describe import BlockSpec, Division
from colrow.planner.activations import (
    Sizes,
    block_bytes,
    context_bytes,
    embedding_bytes,
    head_bytes,
)
from colrow.planner.hardware import Hardware
from colrow.planner.layout import Layout
from colrow.planner.model import ModelShape, held
from colrow.planner.moments import embedding_backward_bytes, moments
from colrow.planner.pipeline_time import layers_in_flight
from colrow.planner.stage_elements import stage_elements

# What an allocator holds beyond what is asked of it, as a share of what comes and goes: blocks of
# 2 MiB and cached ones that do not fit (PyTorch's CUDA caching allocator). Measured reserved over
# allocated memory of transformer training is commonly 1.03 to 1.10.
ALLOCATOR_MARGIN = 0.05
# CUDA context, cuBLAS workspace and NCCL channels of a process, bytes. A data sheet's 80 GB are
# 80 GiB, 6 GB more, so this is on top of that reserve only in small part.
RUNTIME_BYTES = 1.0e9
STEP_COUNTER_BYTES = 4  # torch.optim.AdamW keeps one fp32 step number per parameter tensor


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at its fullest moment; the parts add up.

    Attributes:
        weights: parameters in the training format.
        gradients: accumulated gradients.
        optimizer: states, and the fp32 copy of the weights where there is one.
        activations: kept for backward, all microbatches in flight.
        transient: logits and loss, or temporaries of backward, whichever is more.
        communication: buffers for gathered tensors, and for gathered parameters of ZeRO-3.
        reserve: allocator margin and runtime.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    communication: float
    reserve: float

    @property
    def total(self) -> float:
        """Everything."""
        kept = self.weights + self.gradients + self.optimizer + self.activations
        return kept + self.transient + self.communication + self.reserve

    @property
    def model_states(self) -> float:
        """Weights, gradients and optimiser."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Memory:
    """Memory of all ranks: ``ranks[stage][tp_rank]``; data-parallel replicas are alike."""

    ranks: tuple[tuple[RankMemory, ...], ...]

    @property
    def fullest(self) -> RankMemory:
        """The rank that needs most."""
        return max((rank for stage in self.ranks for rank in stage), key=lambda rank: rank.total)

    @property
    def fullest_place(self) -> tuple[int, int]:
        """``(stage, tp_rank)`` of :attr:`fullest`."""
        places = [
            (stage, rank) for stage, ranks in enumerate(self.ranks) for rank in range(len(ranks))
        ]
        return max(places, key=lambda place: self.ranks[place[0]][place[1]].total)


def training_memory(model: ModelShape, layout: Layout, hardware: Hardware) -> Memory:
    """Memory of every pipeline stage and tensor-parallel rank."""
    key, flash_device = layout.per_microbatch, hardware.device.flash_attention
    alike = ranks_alike(model, model.division(layout.tp, layout.tp_weights))
    result = []
    for stage, kinds in enumerate(layout.kinds_of_stages(model)):
        found = {}
        for rank in set(alike):
            counts = Counter[MicrobatchBytes]()
            for block, count in kinds.items():
                counts[microbatch_bytes(model, block, key, rank, flash_device)] += count
            found[rank] = _rank(model, layout, hardware, _of_stage(counts), stage, kinds, rank)
        result.append(tuple(found[rank] for rank in alike))
    return Memory(tuple(result))


@lru_cache(maxsize=256)
def ranks_alike(model: ModelShape, division: Division) -> tuple[int, ...]:
    """For each tensor-parallel rank the first rank that holds as much of everything."""
    parts = [division.of(model.config.vocab_size)]
    for block in model.kinds:
        heads = block.attention.heads(division)
        parts += [heads.query, heads.key_value]
        parts += [division.of(mlp.ffn_size) for mlp, _ in block.mlp.passes]
    sizes = [tuple(part.size(rank) for part in parts) for rank in range(division.ranks)]
    return tuple(sizes.index(size) for size in sizes)


@dataclass(frozen=True)
class MicrobatchBytes:
    """Bytes of one microbatch on one tensor-parallel rank.

    Attributes:
        block: kept of a block; with full recomputation its input. On a stage the mean.
        context: kept once on each stage, for all its blocks.
        embedding, head: kept of the first and after the last block.
        moments, last_moments: the most that is needed beside what is kept, on a stage and on the
            last stage.
        end: at the end of backward, when nothing else is left.
        end_pipelined: the same when the tied head is on another stage.
        full: of a ``[tokens, hidden]`` tensor.
        residual: the same where it is divided under sequence parallelism.
        key_value: of a block's keys and values.
    """

    block: float
    context: float
    embedding: float
    head: float
    moments: float
    last_moments: float
    end: float
    end_pipelined: float
    full: float
    residual: float
    key_value: float


@lru_cache(maxsize=4096)
def microbatch_bytes(
    model: ModelShape, block: BlockSpec, layout: Layout, rank: int, device_has_flash: bool
) -> MicrobatchBytes:
    """What a microbatch keeps and needs; ``layout``'s pp, dp and schedule do not enter.

    Args:
        block: of the model, as if all were of its kind.
    """
    config, flash = model.config, layout.is_flash(block.attention, device_has_flash)
    sizes = Sizes.of(block, layout, rank)
    kept = sum(block_bytes(block, layout, rank, flash=flash).values())
    most = []
    for last in (False, True):
        at = moments(config, block, layout, rank, last_stage=last, flash=flash)
        if layout.recompute == "full":
            # All but the loss and the head happens while one block's activations are back.
            outside = ("loss", "head backward")
            at = {name: size + (name not in outside) * kept for name, size in at.items()}
        if layout.recompute == "selective":
            at["attention again"] = sizes.scores * (2 * sizes.item + 1)
        most.append(max(at.values()))
    return MicrobatchBytes(
        block=sizes.residual if layout.recompute == "full" else kept,
        context=context_bytes(block, layout, rank),
        embedding=embedding_bytes(config, layout),
        head=head_bytes(config, layout, rank)[0],
        moments=most[0],
        last_moments=most[1],
        end=embedding_backward_bytes(config, layout, rank),
        end_pipelined=embedding_backward_bytes(config, layout, rank, tied_elsewhere=True),
        full=sizes.full,
        residual=sizes.residual,
        key_value=2 * sizes.key_value,
    )


def _of_stage(kinds: Mapping[MicrobatchBytes, int]) -> MicrobatchBytes:
    """Of a stage with so many blocks of each kind."""
    first, *others = kinds
    if not others:
        return first
    most = {
        name: max(getattr(kind, name) for kind in kinds)
        for name in ("context", "moments", "last_moments", "key_value")
    }
    blocks = sum(kind.block * count for kind, count in kinds.items())
    return replace(first, block=blocks / sum(kinds.values()), **most)


def _rank(
    model: ModelShape,
    layout: Layout,
    hardware: Hardware,
    count: MicrobatchBytes,
    stage: int,
    kinds: Mapping[BlockSpec, int],
    rank: int,
) -> RankMemory:
    elements = stage_elements(model, layout, stage, kinds, rank)

    def share(level: int) -> float:
        """Elements of which this rank keeps what ZeRO of this level divides."""
        return elements.over_replicas(layout) if layout.zero >= level else float(elements.total)

    frozen = elements.frozen * layout.frozen_bytes + elements.frozen_ends * layout.itemsize
    if layout.zero >= 3:
        frozen /= layout.replicas
    optimizer = share(1) * layout.state_bytes
    if layout.optimizer.startswith("adamw"):
        optimizer += elements.tensors * STEP_COUNTER_BYTES
    gradients = share(2) * layout.gradient_bytes
    if layout.program.bucketed_gradients and layout.replicas > 1:
        gradients += elements.total * layout.itemsize
    kept, transient = _activations(layout, count, stage, sum(kinds.values()))
    communication = count.full if layout.tp > 1 and layout.sequence_parallel else 0.0
    if layout.zero == 3 and layout.replicas > 1:
        # The block that computes and the one gathered ahead of it.
        largest = max(held(b, layout.division, rank).divided(layout.ep) for b in kinds)
        communication += 2 * largest * layout.itemsize
    if layout.cp > 1:
        communication += 2 * count.key_value  # the keys and values that arrive meanwhile
    if layout.pp > 1:
        communication += 2 * count.residual
    reserve = 0.0
    if not hardware.device.on_host:
        reserve = RUNTIME_BYTES + ALLOCATOR_MARGIN * (kept + transient + communication)
    return RankMemory(
        weights=share(3) * layout.itemsize + frozen,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        transient=transient,
        communication=communication,
        reserve=reserve,
    )


def _activations(
    layout: Layout, count: MicrobatchBytes, stage: int, layers: int
) -> tuple[float, float]:
    """Kept for backward by all microbatches in flight, and needed for a moment beside it."""
    in_flight = layers_in_flight(layout, stage, layers)
    away = min(layout.offload_layers, layers) / max(1, layers)
    last = stage == layout.pp - 1
    microbatches = max(1.0, in_flight / max(1, layers))
    kept = in_flight * count.block * (1 - away) + microbatches * count.context
    if away:
        kept += 2 * count.block  # on their way out and back
    transient = count.last_moments if last else count.moments
    if last:
        kept += count.head
    if stage == 0:
        kept += microbatches * count.embedding
        end = count.end if layout.pp == 1 else count.end_pipelined
        transient = max(transient, end - kept)
    return kept, transient
