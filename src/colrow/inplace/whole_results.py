"""Layers that are divided by tokens or by output features, whose results are whole again."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from colrow.comm import collectives
from colrow.comm.group import ParallelGroup
from colrow.inplace.nested import by_features
from colrow.layers.embedding import check_range
from colrow.layers.fused import column_linear
from colrow.partition import Partition


@dataclass
class Vocabulary:
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


class EmbeddingMixin(nn.Embedding):
    """An embedding of which this rank has a range of the vocabulary.

    It comes after the module's own class, so that what that does with the vectors stays.
    """

    colrow: Vocabulary

    def forward(self, input: Tensor) -> Tensor:
        """Token ids to vectors, on every rank. Forward: all-reduce."""
        how = self.colrow
        check_range(input, how.partition.length, "token id")
        start, stop = how.partition.bounds[how.tp.rank]
        elsewhere = (input < start) | (input >= stop)
        index = (input - start).masked_fill(elsewhere, 0)
        found = F.embedding(index, self.weight, how.padding)
        found = found.masked_fill(elsewhere.unsqueeze(-1), 0)
        return collectives.reduce_from_tp(found, how.tp, layer=how.layer)


class HeadMixin(nn.Linear):
    """A head of which this rank has a range of the vocabulary."""

    colrow: Vocabulary

    def forward(self, input: Tensor) -> Tensor:
        """Logits, gathered, or this rank's where the loss takes those."""
        if input.is_nested:
            return by_features(self.forward, input)
        how = self.colrow
        y = column_linear(input, self.weight, self.bias, how.tp, layer=how.layer)
        if how.local:
            return y
        return collectives.gather_from_tp(y, how.tp, partition=how.partition, layer=how.layer)


@dataclass
class Gathered:
    """How a layer is split whose result is gathered; attributes as in :class:`Column`."""

    tp: ParallelGroup
    layer: str
    transposed: bool
    partition: Partition


class GatheredMixin(nn.Module):
    """A layer ``y = x W^T + b`` of which this rank has some output features; y is gathered."""

    colrow: Gathered
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
