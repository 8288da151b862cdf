"""What follows attention in a block: one MLP, or experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from colrow.layers.describe.parts import (
    ColumnSpec,
    Division,
    Exchange,
    Linear,
    Part,
    RouterSpec,
    RowSpec,
    StackedSpec,
    TableSpec,
)
from colrow.layers.options import Activation, ClampedGate


@dataclass(frozen=True)
class MLPSpec:
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))``.

    Attributes:
        hidden_size, ffn_size: sizes.
        activation, gated: of the hidden features.
        bias: whether both linear layers have one.
        clamped: what a gated one computes of gate and up in place of act(gate) * up, or None.
    """

    hidden_size: int
    ffn_size: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    clamped: ClampedGate | None = None

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


Scores = Literal["softmax", "sigmoid", "chosen"]


@dataclass(frozen=True)
class Routing:
    """How a router turns its logits, one for each expert, into a token's experts and their weights.

    Attributes:
        scores: "softmax" over all experts; "sigmoid" of each alone; or "chosen": those of the
            largest logits, with the softmax over these alone.
        normalised: the weights are divided by their sum.
        scale: what the weights are multiplied by at last.
        bias: whether logits have a learned bias.
        correction: whether experts are chosen by scores to which a number of each expert is added,
            which balances them in training and is no part of the weights (Wang et al. 2024, arXiv
            2408.15664).
        groups, active_groups: where experts lie in several groups, a token's experts are those of
            the best groups alone (DeepSeek-AI 2024, arXiv 2405.04434, section 2.2.2).
        best_of_group: how many of a group's largest scores add up to the group's.
        wide: logits are computed in fp32 from narrower inputs.
    """

    scores: Scores = "softmax"
    normalised: bool = True
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    groups: int = 1
    active_groups: int = 1
    best_of_group: int = 1
    wide: bool = False

    def check(self, experts: int, active: int) -> None:
        """Makes sure that so many active ones of so many experts can be chosen.

        Raises:
            ValueError: naming what cannot be.
        """
        if not 1 <= active <= experts:
            raise ValueError(f"{active} active of {experts} experts: must be between 1 and all")
        if self.groups < 1 or experts % self.groups:
            raise ValueError(f"{experts} experts cannot lie in {self.groups} equal groups")
        if not 1 <= self.active_groups <= self.groups:
            raise ValueError(
                f"{self.active_groups} active of {self.groups} groups of experts: must be between "
                "1 and all"
            )
        size = experts // self.groups
        if active > self.active_groups * size:
            raise ValueError(
                f"{active} active experts are more than {self.active_groups} groups of {size} have"
            )
        if self.groups > 1 and self.best_of_group > size:
            raise ValueError(
                f"the {self.best_of_group} best scores of a group of {size} experts: there are not "
                "so many"
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
        routing: how they are chosen.
        shared_gate: what the shared MLP gives is multiplied by the sigmoid of a number that a
            linear layer makes of the token.
    """

    expert: MLPSpec
    count: int
    active: int
    shared: MLPSpec | None = None
    routing: Routing = Routing()
    shared_gate: bool = False

    def __post_init__(self) -> None:
        self.routing.check(self.count, self.active)
        if self.shared is not None and self.shared.bias:
            raise ValueError("shared experts with biases are not computed")
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate is of shared experts, and there are none")

    @property
    def hidden_size(self) -> int:
        """Of the model."""
        return self.expert.hidden_size

    @property
    def ffn_size(self) -> int:
        """Of one expert."""
        return self.expert.ffn_size

    def parts(self, division: Division) -> dict[str, Part]:
        """Its layers by name, the router first; the experts' are stacked."""
        routing = self.routing
        found: dict[str, Part] = {
            "router": RouterSpec(self.count, self.hidden_size, routing.bias, routing.correction)
        }
        for name, part in self.stacked(division).items():
            found[f"experts.{name}"] = part
        if self.shared is not None:
            for name, shared in self.shared.parts(division).items():
                found[f"shared.{name}"] = shared
        if self.shared_gate:
            found["shared_gate"] = TableSpec(1, self.hidden_size, "partial")
        return found

    def stacked(self, division: Division) -> dict[str, StackedSpec]:
        """The layers of all experts."""
        found = {}
        for name, part in self.expert.parts(division).items():
            assert isinstance(part, ColumnSpec | RowSpec)
            found[name] = StackedSpec(self.count, part)
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
