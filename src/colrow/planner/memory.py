"""The memory of every rank of a training layout, by what it is for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from colrow.models.config import Layout as Division
from colrow.planner.activations import (
    Sizes,
    block_bytes,
    block_input_bytes,
    embedding_bytes,
    head_bytes,
)
from colrow.planner.hardware import Hardware
from colrow.planner.layout import Layout
from colrow.planner.model import ModelShape
from colrow.planner.moments import embedding_backward_bytes, moments
from colrow.planner.pipeline import layers_in_flight

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
        return sum(getattr(self, field.name) for field in fields(self))

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
    division = model.division(layout.tp, layout.tp_weights or None)
    stages = layout.layers_of_stage(model)
    ranks = range(layout.tp) if _uneven(division) else range(1)
    result = []
    for stage, layers in enumerate(stages):
        found = [_rank(model, layout, hardware, division, stage, layers, rank) for rank in ranks]
        result.append(tuple(found) if len(found) == layout.tp else tuple(found * layout.tp))
    return Memory(tuple(result))


def stage_elements(
    model: ModelShape, layout: Layout, division: Division, stage: int, layers: int, rank: int
) -> tuple[int, int]:
    """Parameters of one rank of a stage, and in how many tensors.

    A tied head on another stage than the embedding is a copy of it.
    """
    part = model.shards(division)[rank]
    elements, tensors = layers * part["block"], layers * model.tensors_per_block
    norm = 2 if model.config.has_norm_bias else 1
    if stage == 0:
        elements += part["embedding"]
        tensors += 1 + (model.config.position == "learned")
        tensors += norm if model.config.embedding_norm else 0
    if stage == layout.pp - 1:
        elements += part["head"]
        tensors += norm + (not model.config.tie_embeddings)
        if layout.pp > 1 and model.config.tie_embeddings:
            elements += division.vocab.size(rank) * model.config.hidden_size
            tensors += 1
    return elements, tensors


def _uneven(division: Division) -> bool:
    heads = division.heads
    return not all(
        part.is_even for part in (heads.query, heads.key_value, division.ffn, division.vocab)
    )


def _rank(
    model: ModelShape,
    layout: Layout,
    hardware: Hardware,
    division: Division,
    stage: int,
    layers: int,
    rank: int,
) -> RankMemory:
    elements, tensors = stage_elements(model, layout, division, stage, layers, rank)
    share = [layout.dp if layout.zero > level else 1 for level in range(3)]
    optimizer = elements * layout.state_bytes / share[0]
    if layout.optimizer.startswith("adamw"):
        optimizer += tensors * STEP_COUNTER_BYTES
    kept, transient = _activations(model, layout, hardware, division, stage, layers, rank)
    sizes = Sizes.of(model, layout, division, rank)
    communication = 2 * sizes.full if layout.tp > 1 and layout.sequence_parallel else 0.0
    if layout.zero == 3 and layout.dp > 1:
        # The block that computes and the one gathered ahead of it.
        communication += 2 * model.shards(division)[rank]["block"] * layout.itemsize
    if layout.pp > 1:
        communication += 2 * sizes.residual
    reserve = 0.0
    if hardware.device.processors:
        reserve = RUNTIME_BYTES + ALLOCATOR_MARGIN * (kept + transient + communication)
    return RankMemory(
        weights=elements * layout.itemsize / share[2],
        gradients=elements * layout.gradient_bytes / share[1],
        optimizer=optimizer,
        activations=kept,
        transient=transient,
        communication=communication,
        reserve=reserve,
    )


def _activations(
    model: ModelShape,
    layout: Layout,
    hardware: Hardware,
    division: Division,
    stage: int,
    layers: int,
    rank: int,
) -> tuple[float, float]:
    """Kept for backward, and needed for a moment beside it."""
    flash = layout.is_flash(model, hardware.device.flash_attention)
    block = sum(block_bytes(model, layout, division, rank, flash=flash).values())
    in_flight = layers_in_flight(layout, stage, layers)
    last = stage == layout.pp - 1
    at = moments(model, layout, division, rank, last_stage=last, flash=flash)
    if layout.recompute == "full":
        kept = in_flight * block_input_bytes(model, layout, division, rank)
        # All but the loss happens while one block's activations are back.
        at = {
            name: size + (0.0 if name in ("loss", "head backward") else block)
            for name, size in at.items()
        }
    else:
        kept = in_flight * block
    if layout.recompute == "selective":
        sizes = Sizes.of(model, layout, division, rank)
        at["attention again"] = sizes.scores * (2 * sizes.item + 1)
    microbatches = max(1.0, in_flight / layers) if layers else 1.0
    if stage == 0:
        kept += microbatches * embedding_bytes(model, layout, division, rank)
    if last:
        kept += head_bytes(model, layout, division, rank)[0]
    transient = max(at.values())
    if stage == 0:
        end = embedding_backward_bytes(model, layout, division, rank)
        transient = max(transient, end - kept)
    return kept, transient
