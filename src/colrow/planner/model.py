"""The model as the planner sees it: a decoder's description, and what follows from it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from colrow.layers.describe import (
    Attention,
    AttentionSpec,
    BlockSpec,
    Division,
    ExpertsSpec,
    LatentAttentionSpec,
    MLPSpec,
    elements_of,
    unknown,
)
from colrow.models.config import ModelConfig, num_parameters


@dataclass(frozen=True)
class Held:
    """Parameters that one tensor-parallel rank holds of a block.

    Attributes:
        dense: elements outside of experts.
        experts: elements of all experts together.
        tensors: in how many tensors they are.
    """

    dense: int
    experts: int
    tensors: int

    def divided(self, ep: int) -> int:
        """All elements, the experts divided over so many ranks."""
        return self.dense + self.experts // ep


@dataclass(frozen=True)
class Ends:
    """Parameters that one tensor-parallel rank holds outside of the blocks.

    Attributes:
        embedding, embedding_tensors: elements with positions and the norm after it, and tensors.
        head, head_tensors: of the final norm and, unless tied, the head.
        tied: elements of the embedding, when the head uses it too; 0 otherwise.
    """

    embedding: int
    embedding_tensors: int
    head: int
    head_tensors: int
    tied: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer.

    Attributes:
        name: as shown.
        config: the decoder.
        source: where the shape was published.

    Raises:
        ValueError: for blocks that are made of something that the planner does not know.
    """

    name: str
    config: ModelConfig
    source: str = ""

    def __post_init__(self) -> None:
        for block in self.kinds:
            if not isinstance(block.attention, AttentionSpec | LatentAttentionSpec):
                unknown(block.attention, "the planner")
            if not isinstance(block.mlp, MLPSpec | ExpertsSpec):
                unknown(block.mlp, "the planner")

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.config, self.source))

    def __hash__(self) -> int:
        """Computed once: results are kept by model, and its blocks are many."""
        return self._hash

    @cached_property
    def kinds(self) -> dict[BlockSpec, int]:
        """The different blocks, and how many there are of each."""
        return Counter(self.config.blocks)

    @cached_property
    def usual_block(self) -> BlockSpec:
        """The kind of which there are most."""
        return max(self.kinds, key=lambda block: self.kinds[block])

    @cached_property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return num_parameters(self.config)

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token meets: as ``parameters`` with only the active experts."""
        return self.parameters - sum(
            held(block, Division(1), 0).experts
            // block.mlp.count
            * (block.mlp.count - block.mlp.active)
            * n
            for block, n in self.kinds.items()
            if isinstance(block.mlp, ExpertsSpec)
        )

    @cached_property
    def experts(self) -> int:
        """Experts of a layer, where layers differ their greatest common divisor; 1 without any."""
        counts = [b.mlp.count for b in self.kinds if isinstance(b.mlp, ExpertsSpec)]
        return math.gcd(*counts) if counts else 1

    @cached_property
    def num_heads(self) -> int:
        """Query heads of the block with the fewest: over more ranks none can be divided."""
        return min(block.attention.num_heads for block in self.kinds)

    def division(self, tp: int, shares: tuple[float, ...] = ()) -> Division:
        """How a tensor-parallel group divides it, see :meth:`ModelConfig.divide`.

        Raises:
            ValueError: when it cannot.
        """
        return _division(self, tp, shares)

    def ends(self, division: Division, rank: int) -> Ends:
        """What one rank holds outside of the blocks."""
        return _ends(self, division, rank)


@lru_cache(maxsize=256)
def _division(model: ModelShape, tp: int, shares: tuple[float, ...]) -> Division:
    return model.config.divide(tp, shares)


@lru_cache(maxsize=256)
def _ends(model: ModelShape, division: Division, rank: int) -> Ends:
    parts = replace(model.config, blocks=()).parts(division)
    last = {name: part for name, part in parts.items() if name in ("norm", "head")}
    first = {name: part for name, part in parts.items() if name not in last}
    return Ends(
        elements_of(first, rank),
        sum(len(part.parameters()) for part in first.values()),
        elements_of(last, rank),
        sum(len(part.parameters()) for part in last.values()),
        elements_of({"": parts["embedding"]}, rank) if model.config.tie_embeddings else 0,
    )


@lru_cache(maxsize=4096)
def held(block: BlockSpec, division: Division, rank: int) -> Held:
    """What one rank holds of a block."""
    parts, mlp = block.parts(division), block.mlp
    experts = 0
    if isinstance(mlp, ExpertsSpec):
        experts = elements_of(mlp.stacked(division), rank)
    tensors = sum(len(part.parameters()) for part in parts.values())
    return Held(elements_of(parts, rank) - experts, experts, tensors)


def fullest_rank(block: BlockSpec, division: Division) -> int:
    """The tensor-parallel rank that the others wait for: the one with most attention heads."""
    heads, ffn = block.attention.heads(division).query, division.of(block.mlp.ffn_size)
    return max(range(division.ranks), key=lambda rank: (heads.size(rank), ffn.size(rank)))


def key_value_numbers(attention: Attention, division: Division, rank: int) -> int:
    """Of a token's keys and values together on a rank, as attention reads them."""
    heads = attention.heads(division).key_value.size(rank)
    return heads * (attention.key_size + attention.value_size)
