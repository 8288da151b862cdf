"""Single layers as a group of ranks divides them: their parameters and who holds which part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NoReturn, TypeAlias

from colrow.head_partition import HeadPartition
from colrow.layers.options import Norm
from colrow.partition import Partition, ShardSpec


@dataclass(frozen=True)
class Division:
    """How the dimensions of a model are divided over a tensor-parallel group.

    Attributes:
        ranks: size of the group.
        shares: one number for each rank, on any scale, in whose ratio heads, features and rows are
            divided; empty for as evenly as possible.
        grain: features are divided in units of so many where that makes no rank fuller by more than
            1 in 32: quantised blocks that lie on one rank need no second holder.
    """

    ranks: int
    shares: tuple[float, ...] = ()
    grain: int = 1

    def of(self, length: int) -> Partition:
        """Features or rows of a dimension of this length."""
        if self.shares:
            plain = Partition.ratio(length, self.shares)
        else:
            plain = Partition.even(length, self.ranks)
        if self.grain == 1 or length % self.grain:
            return plain
        weights = self.shares or (1.0,) * self.ranks
        grained = Partition.ratio(length, weights, grain=self.grain)
        return grained if grained.largest <= plain.largest * (1 + 1 / 32) else plain

    def heads(self, num_heads: int, num_kv_heads: int) -> HeadPartition:
        """Query heads, each rank with the KV heads that they read.

        Raises:
            ValueError: more ranks than query heads, or shares that leave a rank without one.
        """
        return HeadPartition.create(
            num_heads, num_kv_heads, self.ranks, weights=self.shares or None
        )


Start = Literal["normal", "residual", "ones", "zeros"]
Gradient = Literal["whole", "by_sequence", "partial"]


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter.

    Attributes:
        shard: its shape and who holds which part.
        start: its initial values: normal, normal and smaller since it writes to the residual
            stream, ones or zeros.
        gradient: what a rank that holds all of it computes: the "whole" gradient; that of its own
            positions under sequence parallelism ("by_sequence"); always only a part ("partial"),
            since it sees its own heads or features. Rows of a divided parameter that several ranks
            hold have partial gradients in any case.
        trained: whether it has a gradient at all.
    """

    shard: ShardSpec
    start: Start = "normal"
    gradient: Gradient = "whole"
    trained: bool = True

    @property
    def elements(self) -> int:
        """Numbers of the whole tensor."""
        return math.prod(self.shard.shape)

    def summed_elements(self, *, sequence_parallel: bool) -> int:
        """Numbers whose gradient is a sum over ranks, as they travel in the all-reduce."""
        shard = self.shard
        if shard.dim is None:
            by_rank = self.gradient == "partial"
            by_rank |= self.gradient == "by_sequence" and sequence_parallel
            return self.elements if by_rank else 0
        if shard.dim:
            return 0
        rows = sum(last - first for block in shard.blocks for first, last in block.shared)
        return rows * math.prod(shard.shape[1:])


@dataclass(frozen=True)
class ColumnSpec:
    """A linear layer whose output features are divided, maybe several side by side.

    Attributes:
        in_features: size of the input.
        blocks: how the output features of each of them are divided.
        bias: whether there is one.
    """

    in_features: int
    blocks: tuple[Partition, ...]
    bias: bool = False

    @property
    def out_features(self) -> int:
        """Of all of them, on all ranks."""
        return sum(block.length for block in self.blocks)

    def parameters(self) -> dict[str, ParameterSpec]:
        """By attribute."""
        out = self.out_features
        found = {"weight": ParameterSpec(ShardSpec((out, self.in_features), 0, self.blocks))}
        if self.bias:
            found["bias"] = ParameterSpec(ShardSpec((out,), 0, self.blocks), "zeros")
        return found


@dataclass(frozen=True)
class RowSpec:
    """A linear layer whose input features are divided; the sum over ranks is its result.

    Attributes:
        partition: how the input features are divided.
        out_features: size of the result.
        bias: whether there is one, which every rank holds.
    """

    partition: Partition
    out_features: int
    bias: bool = False

    def parameters(self) -> dict[str, ParameterSpec]:
        """By attribute."""
        shape = (self.out_features, self.partition.length)
        found = {"weight": ParameterSpec(ShardSpec(shape, 1, (self.partition,)), "residual")}
        if self.bias:
            whole = ShardSpec.replicated(self.out_features)
            found["bias"] = ParameterSpec(whole, "zeros", "by_sequence")
        return found


@dataclass(frozen=True)
class NormSpec:
    """A norm over the last dimension.

    Attributes:
        size: length of that dimension.
        kind: "rmsnorm" or "layernorm", which alone has a bias.
        eps: added to the variance.
        centred: the weight is stored as what is added to 1, as Gemma does.
        wide: the weight multiplies before the result is rounded to the input's dtype (Gemma,
            OLMo 2), not after it (Llama).
        partition: how the dimension is divided over the ranks, which then add up their squares;
            None where each rank has all of it.
        by_head: each rank norms its own heads, so that all its gradients are partial.
        bias: whether a LayerNorm has one.
        heads: each of so many heads has a weight of its own, ``[heads, size]``, and the partition
            is that of the heads; 0 for one weight.
    """

    size: int
    kind: Norm = "rmsnorm"
    eps: float = 1e-5
    centred: bool = False
    wide: bool = False
    partition: Partition | None = None
    by_head: bool = False
    bias: bool = True
    heads: int = 0

    def parameters(self) -> dict[str, ParameterSpec]:
        """By attribute."""
        shape = (self.heads, self.size) if self.heads else (self.size,)
        if self.partition is not None:
            shard = ShardSpec(shape, 0, (self.partition,))
        else:
            shard = ShardSpec.replicated(*shape)
        gradient: Gradient = "partial" if self.by_head else "by_sequence"
        found = {"weight": ParameterSpec(shard, "zeros" if self.centred else "ones", gradient)}
        if self.kind == "layernorm" and self.bias:
            found["bias"] = ParameterSpec(shard, "zeros", gradient)
        return found


@dataclass(frozen=True)
class EmbeddingSpec:
    """Vectors of tokens, the vocabulary divided."""

    vocab: Partition
    hidden_size: int

    def parameters(self) -> dict[str, ParameterSpec]:
        """By attribute."""
        shape = (self.vocab.length, self.hidden_size)
        return {"weight": ParameterSpec(ShardSpec(shape, 0, (self.vocab,)))}


@dataclass(frozen=True)
class TableSpec:
    """A matrix that every rank holds, such as vectors of positions.

    Attributes:
        rows, columns: its shape.
        gradient: see :class:`ParameterSpec`.
    """

    rows: int
    columns: int
    gradient: Gradient = "by_sequence"

    def parameters(self) -> dict[str, ParameterSpec]:
        """By attribute."""
        shard = ShardSpec.replicated(self.rows, self.columns)
        return {"weight": ParameterSpec(shard, "normal", self.gradient)}


@dataclass(frozen=True)
class SinksSpec:
    """One number for each query head, divided with the heads."""

    heads: Partition

    def parameters(self) -> dict[str, ParameterSpec]:
        """By attribute."""
        return {"weight": ParameterSpec(ShardSpec((self.heads.length,), 0, (self.heads,)))}


@dataclass(frozen=True)
class RouterSpec:
    """The router of experts, which every rank holds.

    A rank sees its part of the experts' results alone, which the router's weights multiply, so that
    the gradients are partial.

    Attributes:
        experts, hidden_size: sizes.
        bias: whether there is one.
        correction: whether each expert has a number that is added to its score when experts are
            chosen, and that no gradient changes.
    """

    experts: int
    hidden_size: int
    bias: bool = False
    correction: bool = False

    def parameters(self) -> dict[str, ParameterSpec]:
        """By attribute."""
        row = ShardSpec.replicated(self.experts)
        whole = ShardSpec.replicated(self.experts, self.hidden_size)
        found = {"weight": ParameterSpec(whole, "normal", "partial")}
        if self.bias:
            found["bias"] = ParameterSpec(row, "zeros", "partial")
        if self.correction:
            found["correction"] = ParameterSpec(row, "zeros", trained=False)
        return found


@dataclass(frozen=True)
class StackedSpec:
    """The same linear layer of many experts, in one tensor ``[experts, out, in]``.

    Attributes:
        experts: how many there are.
        layer: one of them. Where its inputs are divided, so is its bias, by output features: each
            rank adds what it holds to its part of the sum over ranks, so that it counts once.
    """

    experts: int
    layer: ColumnSpec | RowSpec

    def parameters(self) -> dict[str, ParameterSpec]:
        """By attribute."""
        found = self.layer.parameters()
        if isinstance(self.layer, RowSpec) and self.layer.bias:
            out = self.layer.out_features
            own = Partition.even(out, self.layer.partition.parts)
            found["bias"] = ParameterSpec(ShardSpec((out,), 0, (own,)), "zeros")
        return {name: self._stacked(parameter) for name, parameter in found.items()}

    def _stacked(self, one: ParameterSpec) -> ParameterSpec:
        shard = one.shard
        assert shard.dim is not None
        shape = (self.experts, *shard.shape)
        return replace(one, shard=ShardSpec(shape, shard.dim + 1, shard.blocks))


Part: TypeAlias = (
    ColumnSpec
    | RowSpec
    | NormSpec
    | EmbeddingSpec
    | TableSpec
    | SinksSpec
    | RouterSpec
    | StackedSpec
)


@dataclass(frozen=True)
class Linear:
    """One matmul with a weight on one rank: ``[tokens, inputs] x [inputs, outputs]``.

    Attributes:
        name: of the layer inside its block.
        experts, active: how many such layers there are, and through how many a token passes.
        parts: of how many layers of a published model it is made; each has an adapter of its own.
    """

    name: str
    inputs: int
    outputs: int
    experts: int = 1
    active: int = 1
    parts: int = 1


@dataclass(frozen=True)
class Exchange:
    """What a layer sends in a step.

    Attributes:
        layer: its name, for the ledger.
        kind: "column": its input comes to all ranks and the input's gradient is summed. "row": its
            result is summed. "squares": numbers per token that norms over divided features add up.
        numbers: of "squares", how many per token.
        keeps_input: of "column" under sequence parallelism: the gathered input stays for backward,
            also where :class:`colrow.Sharding` would have it gathered again.
    """

    layer: str
    kind: Literal["column", "row", "squares"]
    numbers: int = 1
    keeps_input: bool = False


def parameters_of(parts: Mapping[str, Part], prefix: str = "") -> dict[str, ParameterSpec]:
    """The parameters of named parts, by the parts' names and their own."""
    return {
        f"{prefix}{name}.{own}": parameter
        for name, part in parts.items()
        for own, parameter in part.parameters().items()
    }


def elements_of(parts: Mapping[str, Part], rank: int) -> int:
    """Numbers that one rank holds of the parameters of these parts."""
    return sum(
        math.prod(parameter.shard.local_shape(rank)) for parameter in parameters_of(parts).values()
    )


def unknown(met: object, who: str) -> NoReturn:
    """Refuses a description that ``who`` does not handle."""
    raise ValueError(f"{type(met).__name__} is a kind of layer that {who} cannot handle: {met}")
