"""What layers with parameters share: they hold a rank's part of what their description lists."""

from __future__ import annotations

import torch
from torch import nn

from colrow.comm.group import ParallelGroup
from colrow.layers.describe import Part
from colrow.layers.shared import SharedParameter
from colrow.layers.shared_rows import SharedRows
from colrow.partition import ShardSpec
from colrow.shards.steps import watch

_START = {"ones": torch.ones, "zeros": torch.zeros}


class Described(nn.Module):
    """A single layer, made from its description.

    Args:
        spec: the description.
        tp: the tensor-parallel group.
        layer: name for messages and the ledger.
        by_sequence: each rank computes its own positions, so that what all hold gets a part of its
            gradient on each.

    Attributes:
        weight_spec, bias_spec: who holds which part; a bias that the layer lacks has none.

    Parameters: as the description lists them; ones and zeros where it says so, otherwise arbitrary
    values, which the layer's own constructor draws.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_spec: ShardSpec
    bias_spec: ShardSpec | None

    def __init__(
        self,
        spec: Part,
        tp: ParallelGroup,
        *,
        layer: str,
        by_sequence: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tp, self.layer = tp, layer
        watch(self, tp)
        self.bias = self.bias_spec = None
        parameters = spec.parameters()
        self._shared_rows = {
            name: SharedRows.of_parameter(parameter, tp.rank, by_sequence=by_sequence)
            for name, parameter in parameters.items()
        }
        for name, parameter in parameters.items():
            shape = parameter.shard.local_shape(tp.rank)
            first = _START.get(parameter.start, torch.empty)(shape, device=device, dtype=dtype)
            setattr(self, f"{name}_spec", parameter.shard)
            setattr(self, name, nn.Parameter(first, requires_grad=parameter.trained))

    def shared_parameters(self) -> list[SharedParameter]:
        """The parameters, or rows of them, whose gradients are sums over ranks."""
        return [
            SharedParameter(self, name, rows)
            for name, rows in self._shared_rows.items()
            if rows.total
        ]
