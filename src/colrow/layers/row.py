"""The row-parallel linear layer (Shoeybi et al. 2019, "Megatron-LM", section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from colrow.comm import collectives, primitives
from colrow.comm.group import ParallelGroup
from colrow.layers.chunks import check_chunk_bytes
from colrow.layers.decoding import Kernel
from colrow.layers.fused import row_linear
from colrow.layers.linear import (
    check_features,
    check_partition,
    describe,
    divides_sequence,
    named,
    reset_linear_,
)
from colrow.layers.shared import SharedParameter, SharedRows, SharedWeights
from colrow.partition import Partition, ShardSpec
from colrow.shards.steps import watch


class RowParallelLinear(nn.Module):
    """A linear layer whose input features are divided: ``y = sum over ranks of x_r W_r^T, plus b``.

    ==================  ================================  =====================================
    .                   without sequence parallelism      with sequence parallelism
    ==================  ================================  =====================================
    x                   ``[..., in_local]``               ``[..., sequence, in_local]``
    result              ``[..., out]``, on every rank     ``[..., sequence_local, out]``
    forward sends       all-reduce of the result          reduce-scatter of the result
    backward sends      nothing                           all-gather of the result's gradient
    ==================  ================================  =====================================

    Args:
        in_features: global size of the input.
        out_features: size of the result.
        tp: the tensor-parallel group.
        bias: whether to add a bias: once, after the reduction. Every rank holds it; it is trained
            even when the weight is frozen.
        input_is_parallel: whether x is already divided, as a column-parallel layer leaves it. If
            False, x is ``[..., in]`` on every rank and is split first (backward: all-gather).
        sequence_parallel: whether the result is a shard of the sequence.
        partition: how the input features are divided; as evenly as possible by default.
        overlap: matmul and collective as one node of the graph; without it the layer is
            ``F.linear`` and an explicit collective. Both send the same, and neither hides it: the
            collective comes last in forward and, under sequence parallelism, first in backward.
        chunk_bytes: multiply and reduce in up to 4 chunks of at least so many bytes, so that each
            reduction runs behind the next matmul; the same for the gather of backward. None, the
            default, sends whole messages, see :class:`FusedColumnParallelLinear`.
        layer: name for messages and the ledger.

    Attributes:
        kernel: as in :class:`FusedColumnParallelLinear`.

    Parameters: ``weight`` ``[out, in_local]``, ``bias`` ``[out]``, drawn as in
    :class:`FusedColumnParallelLinear`, with the same comparison of seeds.

    Raises:
        ValueError: a partition of something else than ``in_features``, over another number of ranks
            or with several holders of an index; ranks with different seeds; ``overlap=False``
            together with ``chunk_bytes``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: ParallelGroup,
        *,
        bias: bool,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        partition: Partition | None = None,
        overlap: bool = True,
        chunk_bytes: int | None = None,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        partition = partition or Partition.even(in_features, tp.size)
        check_partition(partition, in_features, "in_features")
        primitives.check_split(partition, tp)
        check_chunk_bytes(chunk_bytes, overlap)
        self.in_features, self.out_features = in_features, out_features
        self.tp, self.layer = tp, layer
        watch(self, tp)
        self.partition = partition
        self.input_is_parallel = input_is_parallel
        self.sequence_parallel = sequence_parallel
        self.overlap, self.chunk_bytes = overlap, chunk_bytes
        self.kernel: Kernel | None = None
        self.weight_spec = ShardSpec((out_features, in_features), 1, (partition,))
        self.bias_spec = ShardSpec.replicated(out_features)
        self.weight = nn.Parameter(
            torch.empty(self.weight_spec.local_shape(tp.rank), device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        reset_linear_(self.weight, self.weight_spec, self.bias, self.bias_spec, tp, layer)

    def shared_parameters(self) -> list[SharedParameter]:
        """The bias under sequence parallelism, where each rank adds it to its own positions."""
        if self.bias is None or not self.sequence_parallel:
            return []
        return [SharedParameter(self, "bias", SharedRows.whole(self.out_features))]

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
            sequence: under sequence parallelism, how to divide the sequence; as evenly as possible
                by default. If replicated, the result is whole on every rank.
            shared: the model's gradient bucket, for a layer inside one.

        Raises:
            ValueError: when x is whole although ``input_is_parallel``, or the reverse.
        """
        if self.input_is_parallel:
            expected = self.partition.size(self.tp.rank)
            if x.shape[-1] != expected:
                hint = (
                    "a full input: set input_is_parallel=False or feed it the output of a "
                    "column-parallel layer with gather_output=False"
                    if x.shape[-1] == self.in_features
                    else "the input must be divided as the layer's weight is"
                )
                raise ValueError(
                    f"{named(self)} expects this rank's {expected} of {self.in_features} input "
                    f"features, got a last dimension of {x.shape[-1]}: {hint}"
                )
        else:
            check_features(x, self.in_features, self)
            x = collectives.scatter_to_tp(x, self.tp, partition=self.partition, layer=self.layer)
        if not divides_sequence(self, sequence):
            sequence = None
        elif sequence is None:
            sequence = Partition.even(x.shape[-2], self.tp.size)
        if self.kernel is not None and sequence is None and not torch.is_grad_enabled():
            partial = self.kernel(x, self.weight, None)
            y = primitives.all_reduce(partial, self.tp, layer=self.layer, in_place=True)
        else:
            y = row_linear(
                x,
                self.weight,
                self.tp,
                sequence=sequence,
                overlap=self.overlap,
                chunk_bytes=self.chunk_bytes,
                layer=self.layer,
            )
        if self.bias is None:
            return y
        shared = shared or SharedWeights.of_layer(self)
        return y + shared(self, "bias").to(y.dtype)  # under autocast y is narrower

    def extra_repr(self) -> str:
        """Rank, global and local shape."""
        return describe(self.weight_spec, self.bias is not None, self.tp, self.sequence_parallel)
