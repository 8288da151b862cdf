"""Column-parallel linear layers, alone and fused.

Shoeybi et al. 2019, "Megatron-LM", section 3; sequence parallelism: Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from colrow.comm import collectives, primitives
from colrow.comm.group import ParallelGroup
from colrow.head_partition import HeadPartition
from colrow.layers.decoding import Kernel
from colrow.layers.describe import ColumnSpec
from colrow.layers.described import Described
from colrow.layers.fused import column_linear
from colrow.layers.linear import (
    Sharded,
    check_features,
    check_partition,
    describe,
    reset_linear_,
)
from colrow.layers.shared import SharedWeights
from colrow.partition import Partition
from colrow.sharding import SequenceDivision, Sharding


class ColumnOptions(TypedDict, total=False):
    """Optional arguments of :class:`FusedColumnParallelLinear`, which its forms pass on to it."""

    sequence_parallel: bool
    sharding: Sharding | None
    layer: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class FusedColumnParallelLinear(Sharded, Described):
    """Several column-parallel layers with one input: one matmul, one collective for all of them.

    ``y = x W^T + b`` where this rank holds its range of the output features of every block. In
    backward, the collective on the input gradient runs while the weight gradient is computed.

    ==================  ================================  =====================================
    .                   without sequence parallelism      with sequence parallelism
    ==================  ================================  =====================================
    x                   ``[..., in]``, on every rank      ``[..., sequence_local, in]``
    result              ``[..., out_local]``              ``[..., sequence, out_local]``
    forward sends       nothing                           all-gather of x
    backward sends      all-reduce of x's gradient        reduce-scatter of x's gradient; before
                                                          that the all-gather of x again if
                                                          ``keep_gathered_input`` is False
    ==================  ================================  =====================================

    Args:
        in_features: size of the input.
        blocks: how the output features of each block are divided; they lie side by side in the
            local result, in this order. Ranges that several ranks hold have their gradient summed.
        tp: the tensor-parallel group.
        bias: whether to add a (divided) bias.
        sequence_parallel: whether the input is a shard of the sequence.
        sharding: this and more, see :class:`colrow.Sharding`.
        layer: name for messages and the ledger.

    Attributes:
        kernel: what to multiply with where no gradient is asked for, see
            :mod:`colrow.layers.decoding`; None for the weight itself.

    Parameters: ``weight`` ``[out_local, in]``, ``bias`` ``[out_local]``; drawn as nn.Linear's are,
    with values that depend on torch's CPU seed alone and not on the number of ranks. All ranks must
    construct the layer, after the same seed: they compare it with an all-reduce of 16 bytes
    (nothing on the meta device).

    Raises:
        ValueError: a block that is divided over another number of ranks; ranks with different
            seeds.
    """

    def __init__(
        self,
        in_features: int,
        blocks: Sequence[Partition],
        tp: ParallelGroup,
        *,
        bias: bool,
        sequence_parallel: bool = False,
        sharding: Sharding | None = None,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for block in blocks:
            primitives.check_parts(block, tp)
        spec = ColumnSpec(in_features, tuple(blocks), bias)
        super().__init__(spec, tp, layer=layer, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, spec.out_features
        self.sharding = Sharding.of(sharding, sequence_parallel)
        self.kernel: Kernel | None = None
        reset_linear_(self)

    def forward(
        self,
        x: Tensor,
        *,
        sequence: SequenceDivision = None,
        shared: SharedWeights | None = None,
    ) -> Tensor:
        """Applies the layer.

        Args:
            x: see the table of the class.
            sequence: under sequence parallelism, how the sequence is divided; without it the ranks
                exchange their sizes first. WHOLE says that x is whole on every rank.
            shared: the model's gradient bucket, for a layer inside one.
        """
        check_features(x, self.in_features, self)
        divided = self.divided_sequence(
            sequence, lambda: primitives.exchange_sizes(x, self.tp, -2, layer=self.layer)
        )
        if self.kernel is not None and divided is None and not torch.is_grad_enabled():
            return self.kernel(x, self.weight, self.bias)
        shared = shared or SharedWeights.of_layer(self)
        bias = None if self.bias is None else shared(self, "bias")
        return column_linear(
            x,
            shared(self, "weight"),
            bias,
            self.tp,
            sequence=divided,
            sharding=self.sharding,
            layer=self.layer,
        )

    def extra_repr(self) -> str:
        """Rank, global and local shape."""
        return describe(self.weight_spec, self.bias is not None, self.tp, self.sequence_parallel)


class ColumnParallelLinear(FusedColumnParallelLinear):
    """A linear layer whose output features are divided: ``y_local = x W_local^T + b_local``.

    See :class:`FusedColumnParallelLinear` for shapes and communication.

    Args:
        gather_output: all-gather the result to ``[..., out]`` on every rank (backward: split).
        partition: how the output features are divided; as evenly as possible by default.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: ParallelGroup,
        *,
        bias: bool,
        gather_output: bool = False,
        partition: Partition | None = None,
        **options: Unpack[ColumnOptions],
    ) -> None:
        partition = partition or Partition.even(out_features, tp.size)
        check_partition(partition, out_features, "out_features")
        if gather_output:
            primitives.check_split(partition, tp)
        super().__init__(
            in_features,
            [partition],
            tp,
            bias=bias,
            **options,
        )
        self.partition = partition
        self.gather_output = gather_output

    def forward(
        self,
        x: Tensor,
        *,
        sequence: SequenceDivision = None,
        shared: SharedWeights | None = None,
    ) -> Tensor:
        """As the base class; with ``gather_output`` the result is ``[..., out]``."""
        y = super().forward(x, sequence=sequence, shared=shared)
        if not self.gather_output:
            return y
        return collectives.gather_from_tp(y, self.tp, partition=self.partition, layer=self.layer)


class QKVParallelLinear(FusedColumnParallelLinear):
    """Q, K and V in one matmul, divided by heads; see :class:`FusedColumnParallelLinear`.

    The local result is ``[..., (q_heads_local + 2 * kv_heads_local) * head_dim]``: all local query
    heads, then keys, then values.
    """

    def __init__(
        self,
        in_features: int,
        heads: HeadPartition,
        head_dim: int,
        tp: ParallelGroup,
        *,
        bias: bool,
        **options: Unpack[ColumnOptions],
    ) -> None:
        query, key_value = heads.query.scaled(head_dim), heads.key_value.scaled(head_dim)
        super().__init__(
            in_features,
            [query, key_value, key_value],
            tp,
            bias=bias,
            **options,
        )


class GateUpParallelLinear(FusedColumnParallelLinear):
    """Gate and up projection of a gated MLP in one matmul; see :class:`FusedColumnParallelLinear`.

    The local result is ``[..., 2 * ffn_local]``: the gate's features, then those of up.
    """

    def __init__(
        self,
        in_features: int,
        partition: Partition,
        tp: ParallelGroup,
        *,
        bias: bool,
        **options: Unpack[ColumnOptions],
    ) -> None:
        super().__init__(
            in_features,
            [partition, partition],
            tp,
            bias=bias,
            **options,
        )
