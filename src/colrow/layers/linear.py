"""Column- and row-parallel linear layers, and the fused forms that share one input.

Shoeybi et al. 2019, "Megatron-LM", section 3; sequence parallelism: Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from colrow import rng
from colrow.comm import collectives, primitives
from colrow.layers.fused import column_linear, row_linear
from colrow.layers.shared import SharedParameter, SharedRows, SharedWeights
from colrow.mesh import ParallelGroup
from colrow.partition import HeadPartition, Partition, ShardSpec


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
            split backward need.
        layer: name for messages and the ledger.

    Parameters: ``weight`` ``[out_local, in]``, ``bias`` ``[out_local]``; drawn as nn.Linear's are,
    with values that depend on torch's CPU seed alone and not on the number of ranks.
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
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for block in blocks:
            primitives.check_parts(block, tp)
        self.in_features = in_features
        self.out_features = sum(block.length for block in blocks)
        self.tp, self.layer = tp, layer
        self.sequence_parallel = sequence_parallel
        self.keep_gathered_input = keep_gathered_input
        self.overlap = overlap
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
        reset_linear_(self.weight, self.weight_spec, self.bias, self.bias_spec, tp)

    def shared_parameters(self) -> list[SharedParameter]:
        """Rows that several ranks hold: KV heads whose query heads are divided."""
        found = [SharedParameter(self.weight, self._shared_rows)]
        if self.bias is not None:
            found.append(SharedParameter(self.bias, self._shared_rows))
        return found if self._shared_rows.total else []

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
            sequence: under sequence parallelism, how the sequence is divided; even by default.
            shared: the model's gradient bucket, for a layer inside one.
        """
        _check_features(x, self.in_features, self)
        if not self.sequence_parallel:
            sequence = None
        elif sequence is None:
            sequence = Partition.even(x.shape[-2] * self.tp.size, self.tp.size)
        shared = shared or SharedWeights.of_layer(self)
        bias = None if self.bias is None else shared(self.bias)
        return column_linear(
            x,
            shared(self.weight),
            bias,
            self.tp,
            sequence=sequence,
            keep_gathered_input=self.keep_gathered_input,
            overlap=self.overlap,
            layer=self.layer,
        )

    def extra_repr(self) -> str:
        """Rank, global and local shape."""
        return _describe(self.weight_spec, self.bias is not None, self.tp, self.sequence_parallel)


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
        sequence_parallel: bool = False,
        partition: Partition | None = None,
        keep_gathered_input: bool = True,
        overlap: bool = True,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        partition = partition or Partition.even(out_features, tp.size)
        _check_partition(partition, out_features, "out_features")
        if gather_output:
            primitives.check_split(partition, tp)
        super().__init__(
            in_features,
            [partition],
            tp,
            bias=bias,
            sequence_parallel=sequence_parallel,
            keep_gathered_input=keep_gathered_input,
            overlap=overlap,
            layer=layer,
            device=device,
            dtype=dtype,
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
        sequence_parallel: bool = False,
        keep_gathered_input: bool = True,
        overlap: bool = True,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        query, key_value = heads.query.scaled(head_dim), heads.key_value.scaled(head_dim)
        super().__init__(
            in_features,
            [query, key_value, key_value],
            tp,
            bias=bias,
            sequence_parallel=sequence_parallel,
            keep_gathered_input=keep_gathered_input,
            overlap=overlap,
            layer=layer,
            device=device,
            dtype=dtype,
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
        sequence_parallel: bool = False,
        keep_gathered_input: bool = True,
        overlap: bool = True,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            [partition, partition],
            tp,
            bias=bias,
            sequence_parallel=sequence_parallel,
            keep_gathered_input=keep_gathered_input,
            overlap=overlap,
            layer=layer,
            device=device,
            dtype=dtype,
        )


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
        layer: name for messages and the ledger.

    Parameters: ``weight`` ``[out, in_local]``, ``bias`` ``[out]``.
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
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        partition = partition or Partition.even(in_features, tp.size)
        _check_partition(partition, in_features, "in_features")
        primitives.check_split(partition, tp)
        self.in_features, self.out_features = in_features, out_features
        self.tp, self.layer = tp, layer
        self.partition = partition
        self.input_is_parallel = input_is_parallel
        self.sequence_parallel = sequence_parallel
        self.overlap = overlap
        self.weight_spec = ShardSpec((out_features, in_features), 1, (partition,))
        self.bias_spec = ShardSpec.replicated(out_features)
        self.weight = nn.Parameter(
            torch.empty(self.weight_spec.local_shape(tp.rank), device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        reset_linear_(self.weight, self.weight_spec, self.bias, self.bias_spec, tp)

    def shared_parameters(self) -> list[SharedParameter]:
        """The bias under sequence parallelism, where each rank adds it to its own positions."""
        if self.bias is None or not self.sequence_parallel:
            return []
        return [SharedParameter(self.bias, SharedRows.whole(self.out_features))]

    def forward(
        self,
        x: Tensor,
        *,
        sequence: Partition | None = None,
        shared: SharedWeights | None = None,
    ) -> Tensor:
        """Applies the layer; ``sequence`` and ``shared`` as in :class:`FusedColumnParallelLinear`.

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
                    f"{_name(self)} expects this rank's {expected} of {self.in_features} input "
                    f"features, got a last dimension of {x.shape[-1]}: {hint}"
                )
        else:
            _check_features(x, self.in_features, self)
            x = collectives.scatter_to_tp(x, self.tp, partition=self.partition, layer=self.layer)
        if not self.sequence_parallel:
            sequence = None
        elif sequence is None:
            sequence = Partition.even(x.shape[-2], self.tp.size)
        y = row_linear(
            x, self.weight, self.tp, sequence=sequence, overlap=self.overlap, layer=self.layer
        )
        if self.bias is None:
            return y
        shared = shared or SharedWeights.of_layer(self)
        return y + shared(self.bias).to(y.dtype)  # under autocast y is narrower

    def extra_repr(self) -> str:
        """Rank, global and local shape."""
        return _describe(self.weight_spec, self.bias is not None, self.tp, self.sequence_parallel)


def reset_linear_(
    weight: Tensor,
    weight_spec: ShardSpec,
    bias: Tensor | None,
    bias_spec: ShardSpec,
    tp: ParallelGroup,
) -> None:
    """Uniform on +-1/sqrt(in_features), nn.Linear's default; the same values at any tp size."""
    if weight.is_meta:
        return
    seed, bound = rng.draw_seed(), 1 / math.sqrt(weight_spec.shape[1])
    for name, tensor, spec in (("weight", weight, weight_spec), ("bias", bias, bias_spec)):
        if tensor is not None:
            draw = partial(rng.uniform_between, rng.stream_key(seed, name), bound=bound)
            rng.fill_shard_(tensor, spec, tp.rank, draw)


def _check_partition(partition: Partition, features: int, argument: str) -> None:
    if partition.length != features:
        raise ValueError(f"{argument}={features}, but the partition divides {partition.length}")


def _check_features(x: Tensor, expected: int, module: nn.Module) -> None:
    if x.shape[-1] != expected:
        raise ValueError(
            f"{_name(module)} expects an input with {expected} features, got shape {tuple(x.shape)}"
        )


def _name(module: nn.Module) -> str:
    kind, layer = type(module).__name__, getattr(module, "layer", "")
    return f"{layer} ({kind})" if layer else kind


def _describe(spec: ShardSpec, bias: bool, tp: ParallelGroup, sequence_parallel: bool) -> str:
    local = list(spec.local_shape(tp.rank))
    text = f"weight={list(spec.shape)}, local={local}, tp_rank={tp.rank}/{tp.size}, bias={bias}"
    return text + (", sequence_parallel=True" if sequence_parallel else "")
