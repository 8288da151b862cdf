"""What follows attention in a block: one MLP, or experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from colrow.layers.describe.parts import (
    ColumnSpec,
    Division,
    Exchange,
    Linear,
    Part,
    RowSpec,
    TableSpec,
)
from colrow.layers.options import Activation


@dataclass(frozen=True)
class MLPSpec:
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))``.

    Attributes:
        hidden_size, ffn_size: sizes.
        activation, gated: of the hidden features.
        bias: whether both linear layers have one.
    """

    hidden_size: int
    ffn_size: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False

    def parts(self, division: Division) -> dict[str, Part]:
        """Its layers by name, in the order of the forward pass."""
        ffn = division.of(self.ffn_size)
        blocks = (ffn, ffn) if self.gated else (ffn,)
        return {
            "up": ColumnSpec(self.hidden_size, blocks, self.bias),
            "down": RowSpec(ffn, self.hidden_size, self.bias),
        }

    @property
    def passes(self) -> tuple[tuple[MLPSpec, int], ...]:
        """The MLPs that a token passes through, and how many of each: itself."""
        return ((self, 1),)

    def exchanges(self) -> tuple[Exchange, ...]:
        """What it sends."""
        return (Exchange("up", "column"), Exchange("down", "row"))

    def linears(self, division: Division, rank: int) -> tuple[Linear, ...]:
        """Its matmuls with weights on one rank."""
        ffn, width = division.of(self.ffn_size).size(rank), 2 if self.gated else 1
        return (
            Linear("up", self.hidden_size, width * ffn, parts=width),
            Linear("down", ffn, self.hidden_size),
        )


@dataclass(frozen=True)
class ExpertsSpec:
    """A mixture of experts: a router gives each token to some of many MLPs (Shazeer et al. 2017).

    The router is whole on every rank; of each expert every rank holds a part.

    Attributes:
        expert: what each of them is.
        count: how many there are.
        active: to how many a token goes.
        shared: an MLP beside them through which every token passes, or None.
    """

    expert: MLPSpec
    count: int
    active: int
    shared: MLPSpec | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.count:
            raise ValueError(
                f"{self.active} active of {self.count} experts: must be between 1 and all"
            )

    @property
    def hidden_size(self) -> int:
        """Of the model."""
        return self.expert.hidden_size

    @property
    def ffn_size(self) -> int:
        """Of one expert."""
        return self.expert.ffn_size

    def parts(self, division: Division) -> dict[str, Part]:
        """Its layers by name, the router first."""
        # Each rank sees only its part of the experts' results, which the router's weights multiply.
        found: dict[str, Part] = {"router": TableSpec(self.count, self.hidden_size, "partial")}
        for number in range(self.count):
            for name, part in self.expert.parts(division).items():
                found[f"experts.{number}.{name}"] = part
        if self.shared is not None:
            for name, part in self.shared.parts(division).items():
                found[f"shared.{name}"] = part
        return found

    @property
    def passes(self) -> tuple[tuple[MLPSpec, int], ...]:
        """The MLPs that a token passes through, and how many of each: experts first."""
        shared = () if self.shared is None else ((self.shared, 1),)
        return ((self.expert, self.active), *shared)

    def exchanges(self) -> tuple[Exchange, ...]:
        """What it sends: all experts share one collective before and one after them."""
        return (Exchange("up", "column", keeps_input=True), Exchange("down", "row"))

    def linears(self, division: Division, rank: int) -> tuple[Linear, ...]:
        """Its matmuls with weights on one rank, without the router's small one."""
        shared = () if self.shared is None else self.shared.linears(division, rank)
        return (
            *(replace(linear, name=f"shared.{linear.name}") for linear in shared),
            *(
                replace(linear, experts=self.count, active=self.active)
                for linear in self.expert.linears(division, rank)
            ),
        )


FeedForward: TypeAlias = MLPSpec | ExpertsSpec
