"""The memory of every rank of a training layout, by what it is for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from colrow.planner.activations import (
    Sizes,
    block_bytes,
    context_bytes,
    embedding_bytes,
    head_bytes,
)
from colrow.planner.hardware import Hardware
from colrow.planner.layout import Layout
from colrow.planner.linears import Linear, linears
from colrow.planner.model import ModelShape
from colrow.planner.moments import embedding_backward_bytes, moments
from colrow.planner.pipeline_time import layers_in_flight

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
    kinds = _kinds_of_ranks(model, layout.tp, layout.tp_weights)
    counts = {kind: microbatch_bytes(model, key, kind, flash_device) for kind in set(kinds)}
    result = []
    for stage, layers in enumerate(layout.layers_of_stage(model)):
        dense = dense_layers_of_stage(model, stage, layers)
        found = {}
        for kind, count in counts.items():
            if dense:
                other = microbatch_bytes(model.dense_part, key, kind, flash_device)
                block = ((layers - dense) * count.block + dense * other.block) / layers
                count = replace(count, block=block)
            found[kind] = _rank(model, layout, hardware, count, stage, layers, kind)
        result.append(tuple(found[kind] for kind in kinds))
    return Memory(tuple(result))


@lru_cache(maxsize=256)
def _kinds_of_ranks(model: ModelShape, tp: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    """For each tensor-parallel rank the first rank that holds as much of everything."""
    division = model.division(tp, weights)
    parts = (division.heads.query, division.heads.key_value, division.ffn, division.vocab)
    sizes = [tuple(part.size(rank) for part in parts) for rank in range(tp)]
    return tuple(sizes.index(size) for size in sizes)


@dataclass(frozen=True)
class MicrobatchBytes:
    """Bytes of one microbatch on one tensor-parallel rank.

    Attributes:
        block: kept of a block; with full recomputation its input.
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
    model: ModelShape, layout: Layout, rank: int, device_has_flash: bool
) -> MicrobatchBytes:
    """What a microbatch keeps and needs; ``layout``'s pp, dp and schedule do not enter."""
    division = model.division(layout.tp, layout.tp_weights)
    flash = layout.is_flash(model, device_has_flash)
    sizes = Sizes.of(model, layout, division, rank)
    block = sum(block_bytes(model, layout, division, rank, flash=flash).values())
    most = []
    for last in (False, True):
        at = moments(model, layout, division, rank, last_stage=last, flash=flash)
        if layout.recompute == "full":
            # All but the loss and the head happens while one block's activations are back.
            outside = ("loss", "head backward")
            at = {name: size + (name not in outside) * block for name, size in at.items()}
        if layout.recompute == "selective":
            at["attention again"] = sizes.scores * (2 * sizes.item + 1)
        most.append(max(at.values()))
    end = embedding_backward_bytes(model, layout, division, rank)
    single = embedding_backward_bytes(model, layout, division, rank, tied_elsewhere=True)
    return MicrobatchBytes(
        block=sizes.residual if layout.recompute == "full" else block,
        context=context_bytes(model, layout, division, rank),
        embedding=embedding_bytes(model, layout, division, rank),
        head=head_bytes(model, layout, division, rank)[0],
        moments=most[0],
        last_moments=most[1],
        end=end,
        end_pipelined=single,
        full=sizes.full,
        residual=sizes.residual,
        key_value=2 * sizes.key_value,
    )


@dataclass(frozen=True)
class StageElements:
    """Parameters of one rank of a stage.

    Attributes:
        dense: what is trained and all replicas hold alike.
        experts: what is trained of this rank's experts.
        tensors: in how many tensors the trained ones are.
        frozen: what adapters adapt, and is not trained.
        frozen_ends: embedding, last norm and head where they are frozen; they stay wide.
    """

    dense: int
    experts: int
    tensors: int
    frozen: int = 0
    frozen_ends: int = 0

    @property
    def total(self) -> int:
        """Those that are trained."""
        return self.dense + self.experts

    def over_replicas(self, layout: Layout) -> float:
        """Of the trained ones, a rank's part where those that hold the same divide them."""
        return self.dense / layout.replicas + self.experts / layout.expert_replicas


def dense_layers_of_stage(model: ModelShape, stage: int, layers: int) -> int:
    """How many of a stage's layers have no experts: they are the model's first."""
    return min(layers, model.dense_layers) if stage == 0 else 0


def stage_elements(
    model: ModelShape, layout: Layout, stage: int, layers: int, rank: int
) -> StageElements:
    """Parameters of one rank of a stage.

    A tied head on another stage than the embedding is a copy of it.
    """
    part = model.shards(layout.tp, layout.tp_weights)[rank]
    dense = dense_layers_of_stage(model, stage, layers)
    elements = (layers - dense) * part.block
    if dense:
        elements += dense * model.dense_part.shards(layout.tp, layout.tp_weights)[rank].block
    blocks = elements
    experts = (layers - dense) * part.experts // layout.ep
    tensors = layers * model.tensors_per_block
    norm = 2 if model.config.has_norm_bias else 1
    if stage == 0:
        elements += part.embedding
        tensors += 1 + (model.config.position == "learned")
        tensors += norm if model.config.embedding_norm else 0
    if stage == layout.pp - 1:
        elements += part.head
        tensors += norm + (not model.config.tie_embeddings)
        if layout.pp > 1 and part.tied:
            elements += part.tied
            tensors += 1
    if layout.lora_rank:
        frozen = blocks + experts
        adapters = layers * lora_elements(model, layout, rank)
        count = 2 * sum(linear.parts for linear in _linears(model, layout, rank)) * layers
        return StageElements(adapters, 0, count, frozen, elements - blocks)
    return StageElements(elements, experts, tensors)


def _linears(model: ModelShape, layout: Layout, rank: int) -> tuple[Linear, ...]:
    return linears(model, model.division(layout.tp, layout.tp_weights), rank)


def lora_elements(model: ModelShape, layout: Layout, rank: int) -> int:
    """Parameters of a block's adapters on one rank: rank x (inputs + outputs) of each layer.

    The matrix on the divided side is divided with its layer, the other one is whole.
    """
    return sum(
        layout.lora_rank
        * (linear.parts * linear.inputs + linear.outputs)
        * max(1, linear.experts // layout.ep)
        for linear in _linears(model, layout, rank)
    )


def _rank(
    model: ModelShape,
    layout: Layout,
    hardware: Hardware,
    count: MicrobatchBytes,
    stage: int,
    layers: int,
    rank: int,
) -> RankMemory:
    elements = stage_elements(model, layout, stage, layers, rank)

    def share(level: int) -> float:
        """Elements of which this rank keeps what ZeRO of this level divides."""
        return elements.over_replicas(layout) if layout.zero >= level else float(elements.total)

    frozen = elements.frozen * layout.frozen_bytes + elements.frozen_ends * layout.itemsize
    if layout.zero >= 3:
        frozen /= layout.replicas
    optimizer = share(1) * layout.state_bytes
    if layout.optimizer.startswith("adamw"):
        optimizer += elements.tensors * STEP_COUNTER_BYTES
    kept, transient = _activations(layout, count, stage, layers)
    communication = count.full if layout.tp > 1 and layout.sequence_parallel else 0.0
    if layout.zero == 3 and layout.replicas > 1:
        # The block that computes and the one gathered ahead of it.
        part = model.shards(layout.tp, layout.tp_weights)[rank]
        communication += 2 * (part.block + part.experts // layout.ep) * layout.itemsize
    if layout.cp > 1:
        communication += 2 * count.key_value  # the keys and values that arrive meanwhile
    if layout.pp > 1:
        communication += 2 * count.residual
    reserve = 0.0
    if not hardware.device.on_host:
        reserve = RUNTIME_BYTES + ALLOCATOR_MARGIN * (kept + transient + communication)
    return RankMemory(
        weights=share(3) * layout.itemsize + frozen,
        gradients=share(2) * layout.gradient_bytes,
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
    last = stage == layout.pp - 1
    microbatches = max(1.0, in_flight / max(1, layers))
    kept = in_flight * count.block + microbatches * count.context
    transient = count.last_moments if last else count.moments
    if last:
        kept += count.head
    if stage == 0:
        kept += microbatches * count.embedding
        end = count.end if layout.pp == 1 else count.end_pipelined
        transient = max(transient, end - kept)
    return kept, transient
