"""Column-parallel linear layers, alone and fused.

Shoeybi et al. 2019, "Megatron-LM", section 3; sequence parallelism: Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from colrow.comm import collectives, primitives
from colrow.comm.group import ParallelGroup
from colrow.layers.chunks import check_chunk_bytes
from colrow.layers.decoding import Kernel
from colrow.layers.fused import check_overlap, column_linear
from colrow.layers.linear import (
    check_features,
    check_partition,
    describe,
    divides_sequence,
    reset_linear_,
)
from colrow.layers.shared import SharedParameter, SharedRows, SharedWeights
from colrow.partition import HeadPartition, Partition, ShardSpec
from colrow.shards.steps import watch


class ColumnOptions(TypedDict, total=False):
    """Optional arguments of :class:`FusedColumnParallelLinear`, which its forms pass on to it."""

    sequence_parallel: bool
    keep_gathered_input: bool
    overlap: bool
    chunk_bytes: int | None
    layer: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class FusedColumnParallelLinear(nn.Module):
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
        keep_gathered_input: with sequence parallelism, keep the gathered input for backward (less
            communication) or gather it again (less memory).
        overlap: hide the collective of backward behind the weight gradient. Without it the layer
            is an explicit collective and ``F.linear``, node by node, which pipeline schedules that
            split backward need; under sequence parallelism that form keeps the gathered input.
        chunk_bytes: under sequence parallelism, gather the input of forward in up to 4 chunks of at
            least so many bytes, each behind the matmul of the one before. None, the default,
            gathers it whole: on CPUs the core that multiplies also moves the bytes, and nothing
            is hidden. Not used under torch.compile.
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
            seeds; ``overlap=False`` together with ``keep_gathered_input=False`` or
            ``chunk_bytes``.
    """

    def __init__(
        self,
        in_features: int,
        blocks: Sequence[Partition],
        tp: ParallelGroup,
        *,
        bias: bool,
        sequence_parallel: bool = False,
        keep_gathered_input: bool = True,
        overlap: bool = True,
        chunk_bytes: int | None = None,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for block in blocks:
            primitives.check_parts(block, tp)
        check_overlap(sequence_parallel, keep_gathered_input, overlap)
        check_chunk_bytes(chunk_bytes, overlap)
        self.in_features = in_features
        self.out_features = sum(block.length for block in blocks)
        self.tp, self.layer = tp, layer
        watch(self, tp)
        self.sequence_parallel = sequence_parallel
        self.keep_gathered_input = keep_gathered_input
        self.overlap, self.chunk_bytes = overlap, chunk_bytes
        self.kernel: Kernel | None = None
        self.weight_spec = ShardSpec((self.out_features, in_features), 0, tuple(blocks))
        self.bias_spec = ShardSpec((self.out_features,), 0, tuple(blocks))
        self._shared_rows = SharedRows.of(self.weight_spec, tp.rank)
        self.weight = nn.Parameter(
            torch.empty(self.weight_spec.local_shape(tp.rank), device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(
                torch.empty(self.bias_spec.local_shape(tp.rank), device=device, dtype=dtype)
            )
            if bias
            else None
        )
        reset_linear_(self.weight, self.weight_spec, self.bias, self.bias_spec, tp, layer)

    def shared_parameters(self) -> list[SharedParameter]:
        """Rows that several ranks hold: KV heads whose query heads are divided."""
        if not self._shared_rows.total:
            return []
        names = ["weight"] if self.bias is None else ["weight", "bias"]
        return [SharedParameter(self, name, self._shared_rows) for name in names]

    def forward(
        self,
        x: Tensor,
        *,
        sequence: Partition | None = None,
        shared: SharedWeights | None = None,
    ) -> Tensor:
        """Applies the layer.

        Args:
            x: see the table of the class.
            sequence: under sequence parallelism, how the sequence is divided; without it the ranks
                exchange their sizes first. If replicated, x is whole on every rank.
            shared: the model's gradient bucket, for a layer inside one.
        """
        check_features(x, self.in_features, self)
        if not divides_sequence(self, sequence):
            sequence = None
        elif sequence is None:
            sequence = primitives.exchange_sizes(x, self.tp, -2, layer=self.layer)
        if self.kernel is not None and sequence is None and not torch.is_grad_enabled():
            return self.kernel(x, self.weight, self.bias)
        shared = shared or SharedWeights.of_layer(self)
        bias = None if self.bias is None else shared(self, "bias")
        return column_linear(
            x,
            shared(self, "weight"),
            bias,
            self.tp,
            sequence=sequence,
            keep_gathered_input=self.keep_gathered_input,
            overlap=self.overlap,
            chunk_bytes=self.chunk_bytes,
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
        sequence: Partition | None = None,
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
