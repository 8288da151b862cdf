"""What split layers become: the same objects, of a class derived from their own.

Names of modules and parameters, hooks and training flags stay; ``isinstance`` holds as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.comm import collectives
from colrow.comm.group import ParallelGroup
from colrow.inplace.apply.gradients import Adapter, ColumnEntry
from colrow.inplace.apply.pairs import Pair, Stream
from colrow.layers.embedding import check_range
from colrow.layers.fused import column_linear, row_linear
from colrow.layers.shared import sum_rows
from colrow.layers.shared_rows import SharedRows
from colrow.partition import Partition


@dataclass
class TokenRegion:
    """Blocks in which every rank has some tokens, while a forward pass is inside them.

    Attributes:
        layer: the name of the list of blocks.
        partition: the tokens; None when every rank has all, as with too few of them.
        inside: whether the pass is in a module that sees whole sequences.
    """

    tp: ParallelGroup
    layer: str
    partition: Partition | None = None
    inside: bool = False


@dataclass
class ColumnSplit:
    """How a column-parallel layer is split.

    Attributes:
        tp: the tensor-parallel group.
        layer: its name in the model.
        transposed: whether its weight is ``[in, out]``.
        shared: output features that several ranks hold.
        entry: where its input comes from; None when its gradient is summed further up.
        alone: whether no other layer uses that entry.
        region: where the gradient of its input is summed otherwise while tokens are divided.
        stream: random numbers between it and the row-parallel layer; None without dropout.
        pair: what must follow it.
        others: adapters of this layer, and of those of the same entry with the same input.
    """

    tp: ParallelGroup
    layer: str
    transposed: bool
    shared: SharedRows
    entry: ColumnEntry | None
    alone: bool
    region: TokenRegion | None = None
    stream: Stream | None = None
    pair: Pair | None = None
    others: tuple[Adapter, ...] = ()


class ColumnMixin(nn.Module):
    """A layer ``y = x W^T + b`` of which this rank has some output features."""

    colrow: ColumnSplit
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]``, the same on every rank, to ``[..., out_local]``. Backward: all-reduce."""
        if input.is_nested:
            return by_features(self.forward, input)
        how, x = self.colrow, input
        if how.pair is not None:
            how.pair.column(how.layer)
        weight, bias = self.weight, self.bias
        if how.stream is not None and self.training:
            how.stream.part(x)
        weight = sum_rows(weight, how.tp, how.shared, int(how.transposed), how.layer)
        if bias is not None:
            bias = sum_rows(bias, how.tp, how.shared, 0, how.layer)
        weight = weight.t() if how.transposed else weight
        divided = how.region is not None and how.region.partition is not None
        if how.entry is None or divided:
            return F.linear(x, weight, bias)
        if how.alone:
            return column_linear(x, weight, bias, how.tp, layer=how.layer)
        return F.linear(how.entry(x, self, how.others), weight, bias)

    def extra_repr(self) -> str:
        """Rank and local shape."""
        how = self.colrow
        return (
            f"column-parallel, local={list(self.weight.shape)}, tp_rank={how.tp.rank}/{how.tp.size}"
        )


@dataclass
class RowSplit:
    """How a row-parallel layer is split; attributes as in :class:`ColumnSplit`.

    Attributes:
        region: where its result is divided by tokens while they are.
    """

    tp: ParallelGroup
    layer: str
    transposed: bool
    region: TokenRegion | None = None
    stream: Stream | None = None
    pair: Pair | None = None


class RowMixin(nn.Module):
    """A layer ``y = x W^T + b`` of which this rank has some input features."""

    colrow: RowSplit
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_local]`` to ``[..., out]`` on every rank. Forward: all-reduce.

        To this rank's tokens where they are divided. Forward: reduce-scatter; backward: all-gather.
        """
        if input.is_nested:
            return by_features(self.forward, input)
        how, x = self.colrow, input
        if how.pair is not None:
            how.pair.row()
        if how.stream is not None:
            how.stream.join(x)
        weight = self.weight.t() if how.transposed else self.weight
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{how.layer} holds {weight.shape[1]} input features on this rank, but got an "
                f"input of {x.shape[-1]}"
            )
        tokens = how.region.partition if how.region is not None else None
        y = row_linear(x, weight, how.tp, sequence=tokens, layer=how.layer)
        if tokens is not None and y._is_view():
            y = y.clone()  # so that it may be written into
        bias = self.bias
        if bias is not None and tokens is not None:
            bias = sum_rows(bias, how.tp, SharedRows.whole(bias.shape[0]), 0, how.layer)
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Rank and local shape."""
        how = self.colrow
        return f"row-parallel, local={list(self.weight.shape)}, tp_rank={how.tp.rank}/{how.tp.size}"


@dataclass
class VocabularySplit:
    """How an embedding or a head is divided over the ranks.

    Attributes:
        partition: the vocabulary.
        padding: the local index that gets no gradient.
        local: whether a head gives this rank's logits only; set around a forward with labels.
    """

    tp: ParallelGroup
    layer: str
    partition: Partition
    padding: int | None = None
    local: bool = False


def vectors(ids: Tensor, shard: Tensor, how: VocabularySplit) -> Tensor:
    """Token ids to vectors, on every rank, from its rows of the table. Forward: all-reduce."""
    check_range(ids, how.partition.length, "token id")
    start, stop = how.partition.bounds[how.tp.rank]
    elsewhere = (ids < start) | (ids >= stop)
    found = F.embedding((ids - start).masked_fill(elsewhere, 0), shard, how.padding)
    found = found.masked_fill(elsewhere.unsqueeze(-1), 0)
    return collectives.reduce_from_tp(found, how.tp, layer=how.layer)


class EmbeddingMixin(nn.Embedding):
    """An embedding of which this rank has a range of the vocabulary.

    It comes after the module's own class, so that what that does with the vectors stays.
    """

    colrow: VocabularySplit

    def forward(self, input: Tensor) -> Tensor:
        """Token ids to vectors, on every rank. Forward: all-reduce."""
        return vectors(input, self.weight, self.colrow)


class HeadMixin(nn.Linear):
    """A head of which this rank has a range of the vocabulary."""

    colrow: VocabularySplit

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to all logits (all-gather), or this rank's where the loss takes those."""
        if input.is_nested:
            return by_features(self.forward, input)
        how = self.colrow
        y = column_linear(input, self.weight, self.bias, how.tp, layer=how.layer)
        if how.local:
            return y
        return collectives.gather_from_tp(y, how.tp, partition=how.partition, layer=how.layer)


@dataclass
class GatheredSplit:
    """How a layer is split whose result is gathered; attributes as of :class:`ColumnSplit`."""

    tp: ParallelGroup
    layer: str
    transposed: bool
    partition: Partition


class GatheredMixin(nn.Module):
    """A layer ``y = x W^T + b`` of which this rank has some output features; y is gathered."""

    colrow: GatheredSplit
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, both whole. Sends an all-gather, then an all-reduce."""
        if input.is_nested:
            return by_features(self.forward, input)
        how = self.colrow
        weight = self.weight.t() if how.transposed else self.weight
        y = column_linear(input, weight, self.bias, how.tp, layer=how.layer)
        return collectives.gather_from_tp(y, how.tp, partition=how.partition, layer=how.layer)


def by_features(multiply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``multiply(x)`` for ``[..., in]`` to ``[..., out]``; nested for a nested ``x``.

    The rows of a nested tensor go through it one behind the other, as one plain tensor.
    """
    if not x.is_nested:
        return multiply(x)
    if x.layout == torch.jagged:
        # With its own offsets, since torch adds jagged tensors of the same offsets alone.
        jagged: Any = x
        values = multiply(jagged.values())
        result: Tensor = torch.nested.nested_tensor_from_jagged(
            values, jagged.offsets(), jagged.lengths()
        )
        return result
    rows = x.unbind()
    flat = multiply(torch.cat([row.flatten(0, -2) for row in rows]))
    parts = flat.split([row.shape[:-1].numel() for row in rows])
    shaped = [part.view(*row.shape[:-1], -1) for part, row in zip(parts, rows, strict=True)]
    return torch.nested.as_nested_tensor(shaped)
