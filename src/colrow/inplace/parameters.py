"""Modules that use parameters directly: gradients summed, shards gathered, results less a base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from colrow.comm import collectives
from colrow.comm.group import ParallelGroup
from colrow.inplace.gradients import sum_rows
from colrow.layers.shared import SharedRows
from colrow.partition import Partition


@dataclass
class Shared:
    """How a parameter is used of whose gradient every rank sees a part.

    Attributes:
        once: whether every rank adds it to a sum over ranks, so that it counts 1/tp on each.
    """

    tp: ParallelGroup
    layer: str
    once: bool


@dataclass
class Spread:
    """How a parameter is divided that every rank needs whole when it is used.

    Attributes:
        dim: the dimension that is divided.
        partition: of it.
    """

    tp: ParallelGroup
    layer: str
    dim: int
    partition: Partition

    def whole(self, shard: Tensor) -> Tensor:
        """The parameter from the ranks' shards. Forward: all-gather; backward: the own range."""
        last = shard.movedim(self.dim, -1)
        joined = collectives.gather_from_tp(
            last, self.tp, partition=self.partition, layer=self.layer
        )
        return joined.movedim(-1, self.dim).contiguous()


class ParametersMixin(nn.Module):
    """A module whose parameters are summed in backward, or gathered where its code reads them.

    Inside its own forward a parameter is gathered once, however often it is read.
    """

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        # FSDP2 looks for the object that it holds between forward passes, and takes what it gets.
        if value is None or isinstance(value, DTensor):
            return value
        spread: dict[str, Spread] | None = self.__dict__.get("colrow_spread")
        if spread and name in spread:
            value = _gathered(self, name, spread[name], value)
        shared: dict[str, Shared] | None = self.__dict__.get("colrow_shared")
        if shared and name in shared:
            how = shared[name]
            value = sum_rows(value, how.tp, SharedRows.whole(value.shape[0]), 0, how.layer)
            return value / how.tp.size if how.once else value
        return value


def _gathered(module: nn.Module, name: str, how: Spread, shard: Tensor) -> Tensor:
    known: dict[str, Tensor] | None = module.__dict__.get("colrow_whole")
    if known is None:
        return how.whole(shard)
    if name not in known:
        known[name] = how.whole(shard)
    return known[name]


def begin_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook: from now on what is gathered is kept."""
    module.__dict__["colrow_whole"] = {}


def end_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook: what was gathered is let go."""
    module.__dict__.pop("colrow_whole", None)


class LessMixin(nn.Module):
    """A module whose result is a part of a sum to which another rank adds what it has without
    its last parameter: here that is computed too, and subtracted.
    """

    colrow_less: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own result, less what it is when the parameter is 0."""
        own = super().forward
        result = own(*args, **kwargs)
        path, _, name = self.colrow_less.rpartition(".")
        parameters: dict[str, Any] = self.get_submodule(path)._parameters
        whole = parameters[name]
        parameters[name] = torch.zeros((), dtype=whole.dtype, device=whole.device).expand_as(whole)
        try:
            base = own(*args, **kwargs)
        finally:
            parameters[name] = whole
        leaves, spec = pytree.tree_flatten(result)
        return pytree.tree_unflatten(
            [
                y - y0 if isinstance(y, Tensor) and y.is_floating_point() else y
                for y, y0 in zip(leaves, pytree.tree_leaves(base), strict=True)
            ],
            spec,
        )
