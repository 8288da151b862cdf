"""The parameters of one rank of a pipeline stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from colrow.layers.describe import BlockSpec
from colrow.planner.layout import Layout
from colrow.planner.model import ModelShape, held


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


def stage_elements(
    model: ModelShape, layout: Layout, stage: int, kinds: Mapping[BlockSpec, int], rank: int
) -> StageElements:
    """Parameters of one rank of a stage that has so many blocks of each kind.

    A tied head on another stage than the embedding is a copy of it.
    """
    division, ends = layout.division, model.ends(layout.division, rank)
    of_kinds = [(held(block, division, rank), count) for block, count in kinds.items()]
    blocks = sum(count * part.dense for part, count in of_kinds)
    experts = sum(count * part.experts // layout.ep for part, count in of_kinds)
    tensors = sum(count * part.tensors for part, count in of_kinds)
    outside = 0
    if stage == 0:
        outside += ends.embedding
        tensors += ends.embedding_tensors
    if stage == layout.pp - 1:
        outside += ends.head
        tensors += ends.head_tensors
        if layout.pp > 1 and ends.tied:
            outside += ends.tied
            tensors += 1
    if layout.lora_rank:
        adapters = sum(lora_elements(b, layout, rank) * count for b, count in kinds.items())
        pairs = sum(
            linear.parts * count
            for block, count in kinds.items()
            for linear in block.linears(division, rank)
        )
        return StageElements(adapters, 0, 2 * pairs, blocks + experts, outside)
    return StageElements(blocks + outside, experts, tensors)


def lora_elements(block: BlockSpec, layout: Layout, rank: int) -> int:
    """Parameters of a block's adapters on one rank: rank x (inputs + outputs) of each layer.

    The matrix on the divided side is divided with its layer, the other one is whole.
    """
    return sum(
        layout.lora_rank
        * (linear.parts * linear.inputs + linear.outputs)
        * max(1, linear.experts // layout.ep)
        for linear in block.linears(layout.division, rank)
    )
