"""Which consecutive blocks each stage of a pipeline holds, and which rank a stage is on. No torch.

A model's blocks are cut into as many runs as there are stages. The embedding goes with the first
stage, the final norm and the head with the last; a tied embedding is on both. Interleaved schedules
give a rank several stages (Narayanan et al. 2021, section 2.2.2): round the ranks again and again,
or for ZBV to the last rank and back (Qi et al. 2024, arXiv 2405.15362).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from colrow.layers.describe import BlockSpec, Division, ExpertsSpec
from colrow.models.config import ModelConfig
from colrow.partition import Partition, parse_shares

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One stage: the blocks from ``start`` up to but not including ``stop``.

    Attributes:
        index, count: its number from 0, and how many stages there are.
        start, stop: its blocks, numbered as in the whole model.
    """

    index: int
    count: int
    start: int
    stop: int

    @property
    def is_first(self) -> bool:
        """It has the embedding and takes token ids."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """It has the final norm and the head and gives logits."""
        return self.index == self.count - 1

    @property
    def blocks(self) -> range:
        """Numbers of its blocks."""
        return range(self.start, self.stop)

    def holds(self, parameter: str, *, tied: bool) -> bool:
        """Whether a parameter of the whole model, by colrow's name, is on this stage."""
        module = parameter.split(".", 1)[0]
        if module == "blocks":
            return int(parameter.split(".")[1]) in self.blocks
        if module in ("norm", "head"):
            return self.is_last
        return self.is_first or (tied and module == "embedding" and self.is_last)


@dataclass(frozen=True)
class LayerSplit:
    """How the blocks of a model are divided over the stages of a pipeline.

    Attributes:
        sizes: blocks of each stage, in the order of the forward pass.
        ranks: pipeline-parallel size.
        v_shaped: stages go from the first rank to the last and back, two on each; otherwise they go
            round the ranks as often as needed.

    Raises:
        ValueError: stages that are not a multiple of the ranks, or a stage without a block.
    """

    sizes: tuple[int, ...]
    ranks: int
    v_shaped: bool = False

    def __post_init__(self) -> None:
        if self.ranks < 1 or len(self.sizes) % self.ranks or not self.sizes:
            raise ValueError(
                f"{len(self.sizes)} pipeline stages cannot be placed on {self.ranks} ranks: each "
                "rank needs equally many"
            )
        if self.v_shaped and len(self.sizes) != 2 * self.ranks:
            raise ValueError(
                f"a V-shaped pipeline has two stages on each of its {self.ranks} ranks, "
                f"not {len(self.sizes)} in all"
            )
        if min(self.sizes) < 1:
            raise ValueError(
                f"the layer split {list(self.sizes)} leaves stage {self.sizes.index(0)} without a "
                "layer: every stage needs at least one, so give that one a larger share"
            )

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        ranks: int,
        split: str | Sequence[float] | None = None,
        *,
        stages_per_rank: int = 1,
        v_shaped: bool = False,
        costs: Costs | None = None,
    ) -> LayerSplit:
        """The split that is meant.

        Args:
            ranks: pipeline-parallel size.
            split: numbers, also as a text such as "3,1": one for each rank, or one for each stage.
                Whole numbers that add up to the number of layers are layers; others are shares.
                By default the stages are balanced.
            costs: for balancing; by default :func:`layer_costs`.

        Raises:
            ValueError: more stages than layers, or numbers that do not say a split.
        """
        layers, stages = config.num_layers, ranks * stages_per_rank
        if stages > layers:
            raise ValueError(
                f"{stages} pipeline stages ({ranks} ranks x {stages_per_rank}) need at least as "
                f"many layers, and the model has {layers}: use fewer"
            )
        if split is None:
            sizes = balanced(layers, stages, costs or layer_costs(config))
            return cls(sizes, ranks, v_shaped)
        numbers = parse_shares(split, "layer split")
        if len(numbers) not in (ranks, stages):
            raise ValueError(
                f"the layer split {split!r} has {len(numbers)} number{_s(len(numbers))} for "
                f"{ranks} pipeline rank{_s(ranks)}"
                + (f" (or {stages} stages)" if stages != ranks else "")
                + ": give one for each, or leave it out"
            )
        literal = sum(numbers) == layers and all(n == int(n) for n in numbers)
        if len(numbers) == stages:
            given = tuple(int(n) for n in numbers)
            sizes = given if literal else Partition.ratio(layers, numbers).sizes
            return cls(sizes, ranks, v_shaped)
        of_rank = [int(n) for n in numbers] if literal else Partition.ratio(layers, numbers).sizes
        parts = [Partition.even(n, stages_per_rank).sizes for n in of_rank]
        order = [place(stage, ranks, v_shaped) for stage in range(stages)]
        return cls(
            tuple(parts[rank][stage // ranks] for stage, rank in enumerate(order)), ranks, v_shaped
        )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages, in order."""
        found, start = [], 0
        for index, size in enumerate(self.sizes):
            found.append(Stage(index, len(self.sizes), start, start + size))
            start += size
        return tuple(found)

    @property
    def stages_per_rank(self) -> int:
        """How many stages a rank holds."""
        return len(self.sizes) // self.ranks

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that holds a stage."""
        return place(stage, self.ranks, self.v_shaped)

    def of_rank(self, rank: int) -> tuple[Stage, ...]:
        """The stages on a pipeline rank."""
        return tuple(stage for stage in self.stages if self.rank_of(stage.index) == rank)

    @property
    def last_rank(self) -> int:
        """The rank with the head, which knows the loss."""
        return self.rank_of(len(self.sizes) - 1)

    def layers_of_rank(self, rank: int) -> list[int]:
        """Numbers of the blocks on a pipeline rank."""
        return [block for stage in self.of_rank(rank) for block in stage.blocks]

    def held(self, specs: Mapping[str, T], rank: int, *, tied: bool) -> dict[str, T]:
        """Of the whole model's parameters those on a pipeline rank, in the same order."""
        stages = self.of_rank(rank)
        return {
            name: spec
            for name, spec in specs.items()
            if any(stage.holds(name, tied=tied) for stage in stages)
        }


def place(stage: int, ranks: int, v_shaped: bool) -> int:
    """The rank of a stage: round and round, or there and back."""
    turn, at = divmod(stage, ranks)
    return ranks - 1 - at if v_shaped and turn % 2 else at


def _s(count: int) -> str:
    return "" if count == 1 else "s"


@dataclass(frozen=True)
class Costs:
    """What makes a stage slow, in any unit.

    Attributes:
        first: the embedding.
        block: one block.
        last: final norm, head and loss.
    """

    first: float
    block: float
    last: float


def layer_costs(config: ModelConfig, sequence: int = 0) -> Costs:
    """Floating point operations per token of the forward pass.

    Two for each weight of a matmul that the token meets, and with a ``sequence`` length two
    products of queries with half of the keys and values. The embedding looks up and multiplies
    nothing. Where blocks differ, their mean counts.
    """
    operations = [_operations(block, sequence) for block in config.blocks]
    return Costs(
        0.0, sum(operations) / len(operations), float(2 * config.hidden_size * config.vocab_size)
    )


def _operations(block: BlockSpec, sequence: int) -> float:
    attention, mlp = block.attention, block.mlp
    active = mlp.active / mlp.count if isinstance(mlp, ExpertsSpec) else 1.0
    weights = sum(
        linear.inputs * linear.outputs * (linear.experts * active if linear.experts > 1 else 1)
        for linear in block.linears(Division(1), 0)
    )
    numbers = attention.num_heads * (attention.key_size + attention.value_size)
    return 2.0 * weights + sequence * numbers


def balanced(layers: int, stages: int, costs: Costs) -> tuple[int, ...]:
    """Blocks of each stage so that the slowest stage is as fast as it can be.

    Among splits that are equally good there, the one with the fewest blocks in the middle, so that
    the ends do not idle.
    """
    if stages == 1:
        return (layers,)
    best: tuple[float, int] | None = None
    sizes: tuple[int, ...] = ()
    for on_first in range(1, layers - stages + 2):
        for on_last in range(1, layers - on_first - stages + 3):
            rest = layers - on_first - on_last
            if stages == 2 and rest:
                continue
            middle = -(-rest // (stages - 2)) if stages > 2 else 0
            slowest = max(
                costs.first + on_first * costs.block,
                middle * costs.block,
                on_last * costs.block + costs.last,
            )
            if best is None or (slowest, middle) < best:
                best = slowest, middle
                inner = Partition.even(rest, stages - 2).sizes if stages > 2 else ()
                sizes = (on_first, *inner, on_last)
    return sizes
