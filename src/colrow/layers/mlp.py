"""The column-then-row MLP: two collectives per step and direction-pair, none in the middle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.layers.activation import ACTIVATIONS
from colrow.layers.column import (
    ColumnOptions,
    ColumnParallelLinear,
    FusedColumnParallelLinear,
    GateUpParallelLinear,
)
from colrow.layers.linear import Sharded
from colrow.layers.options import Activation
from colrow.layers.row import RowParallelLinear
from colrow.layers.shared import SharedWeights
from colrow.partition import Partition
from colrow.sharding import SequenceDivision, Sharding


class ParallelMLP(Sharded, nn.Module):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))`` (SwiGLU: Shazeer 2020).

    ================  ===================================  ====================================
    .                 without sequence parallelism         with sequence parallelism
    ================  ===================================  ====================================
    x, result         ``[..., hidden]``, on every rank     ``[..., sequence_local, hidden]``
    forward sends     all-reduce                           all-gather, reduce-scatter
    backward sends    all-reduce                           all-gather, reduce-scatter
    ================  ===================================  ====================================

    Args:
        hidden_size, ffn_size: global sizes; any ffn_size from the number of ranks up.
        tp: the tensor-parallel group.
        activation: name of the activation function.
        gated: whether there is a gate; gate and up share one matmul and one collective.
        bias: whether both layers have biases.
        partition: how ``ffn_size`` is divided; as evenly as possible by default.
        sequence_parallel: whether input and result are shards of the sequence.
        sharding: this and more, see :class:`colrow.Sharding`.
        layer: name for messages and the ledger.

    Raises:
        ValueError: an unknown activation; what the two linear layers refuse.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        tp: ParallelGroup,
        *,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        partition: Partition | None = None,
        sequence_parallel: bool = False,
        sharding: Sharding | None = None,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: must be one of {sorted(ACTIVATIONS)}")
        partition = partition or Partition.even(ffn_size, tp.size)
        prefix = f"{layer}." if layer else ""
        self.gated, self.partition = gated, partition
        self.activation = activation
        self.sharding = Sharding.of(sharding, sequence_parallel)
        options: ColumnOptions = {
            "sharding": self.sharding,
            "layer": f"{prefix}up",
            "device": device,
            "dtype": dtype,
        }
        self.up: FusedColumnParallelLinear
        if gated:
            self.up = GateUpParallelLinear(hidden_size, partition, tp, bias=bias, **options)
        else:
            self.up = ColumnParallelLinear(
                hidden_size,
                ffn_size,
                tp,
                bias=bias,
                partition=partition,
                **options,
            )
        self.down = RowParallelLinear(
            ffn_size,
            hidden_size,
            tp,
            bias=bias,
            sharding=self.sharding,
            partition=partition,
            layer=f"{prefix}down",
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Tensor,
        *,
        sequence: SequenceDivision = None,
        shared: SharedWeights | None = None,
    ) -> Tensor:
        """See the table of the class; ``sequence`` and ``shared`` as in the linear layers."""
        if sequence is None and self.sequence_parallel:  # both layers must divide it alike
            sequence = primitives.exchange_sizes(x, self.up.tp, -2, layer=self.up.layer)
        hidden = self.up(x, sequence=sequence, shared=shared)  # [..., (2 *) ffn_local]
        result: Tensor = self.down(self.activated(hidden), sequence=sequence, shared=shared)
        return result

    def activated(self, hidden: Tensor) -> Tensor:
        """What :attr:`up` gives, ``[..., (2 *) ffn_local]``, behind the activation and the gate."""
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            return act(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return act(gate) * up
