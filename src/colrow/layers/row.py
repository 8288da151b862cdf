"""The row-parallel linear layer (Shoeybi et al. 2019, "Megatron-LM", section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from colrow.comm import collectives, primitives
from colrow.comm.group import ParallelGroup
from colrow.layers.decoding import Kernel
from colrow.layers.describe import RowSpec
from colrow.layers.described import Described
from colrow.layers.fused import row_linear
from colrow.layers.linear import (
    Sharded,
    check_features,
    check_partition,
    describe,
    named,
    reset_linear_,
)
from colrow.layers.shared import SharedWeights
from colrow.partition import Partition
from colrow.sharding import SequenceDivision, Sharding


class RowParallelLinear(Sharded, Described):
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
        sharding: this and more, see :class:`colrow.Sharding`. ``overlap`` hides nothing here: the
            collective comes last in forward and, under sequence parallelism, first in backward.
        layer: name for messages and the ledger.

    Attributes:
        kernel: as in :class:`FusedColumnParallelLinear`.

    Parameters: ``weight`` ``[out, in_local]``, ``bias`` ``[out]``, drawn as in
    :class:`FusedColumnParallelLinear`, with the same comparison of seeds.

    Raises:
        ValueError: a partition of something else than ``in_features``, over another number of ranks
            or with several holders of an index; ranks with different seeds.
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
        sharding: Sharding | None = None,
        partition: Partition | None = None,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        partition = partition or Partition.even(in_features, tp.size)
        check_partition(partition, in_features, "in_features")
        primitives.check_split(partition, tp)
        sharding = Sharding.of(sharding, sequence_parallel)
        super().__init__(
            RowSpec(partition, out_features, bias),
            tp,
            layer=layer,
            by_sequence=sharding.sequence_parallel,
            device=device,
            dtype=dtype,
        )
        self.in_features, self.out_features = in_features, out_features
        self.partition = partition
        self.input_is_parallel = input_is_parallel
        self.sharding = sharding
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
            sequence: under sequence parallelism, how to divide the sequence; as evenly as possible
                by default. WHOLE asks for a result that is whole on every rank.
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
        divided = self.divided_sequence(sequence, lambda: Partition.even(x.shape[-2], self.tp.size))
        if self.kernel is not None and divided is None and not torch.is_grad_enabled():
            partial = self.kernel(x, self.weight, None)
            y = primitives.all_reduce(partial, self.tp, layer=self.layer, in_place=True)
        else:
            y = row_linear(
                x,
                self.weight,
                self.tp,
                sequence=divided,
                sharding=self.sharding,
                layer=self.layer,
            )
        if self.bias is None:
            return y
        shared = shared or SharedWeights.of_layer(self)
        return y + shared(self, "bias").to(y.dtype)  # under autocast y is narrower

    def extra_repr(self) -> str:
        """Rank, global and local shape."""
        return describe(self.weight_spec, self.bias is not None, self.tp, self.sequence_parallel)
