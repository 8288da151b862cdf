"""What happens in a module around its split layers: to its parameters, arguments and results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colrow.comm import collectives
from colrow.comm.compat import as_dtensor
from colrow.comm.group import ParallelGroup
from colrow.inplace.find.shard_groups import take_periodic
from colrow.inplace.observe.calls import Key, ModuleCall
from colrow.layers.shared import sum_rows
from colrow.layers.shared_rows import SharedRows
from colrow.partition import Partition


@dataclass
class PartialGradient:
    """How a parameter is used of whose gradient every rank sees a part.

    Attributes:
        counted_once: whether every rank adds it to a sum, so that it counts 1/tp on each.
    """

    tp: ParallelGroup
    layer: str
    counted_once: bool


@dataclass
class GatheredParameter:
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
        if value is None or as_dtensor(value) is not None:
            return value
        spread: dict[str, GatheredParameter] | None = self.__dict__.get("colrow_spread")
        if spread and name in spread:
            value = _gathered(self, name, spread[name], value)
        shared: dict[str, PartialGradient] | None = self.__dict__.get("colrow_shared")
        if shared and name in shared:
            how = shared[name]
            value = sum_rows(value, how.tp, SharedRows.whole(value.shape[0]), 0, how.layer)
            return value / how.tp.size if how.counted_once else value
        return value


def _gathered(module: nn.Module, name: str, how: GatheredParameter, shard: Tensor) -> Tensor:
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


class SubtractBaseMixin(nn.Module):
    """A module whose result is a part of a sum, with a term that no divided weight multiplies.

    That term must count once in the sum: all ranks but the first compute it, with zeros in place of
    the module's last parameter, and subtract it.
    """

    colrow_base_without: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own result, minus its result with zeros in place of the parameter."""
        own = super().forward
        result = own(*args, **kwargs)
        path, _, name = self.colrow_base_without.rpartition(".")
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


class SumResults:
    """A forward hook: the ranks' results are parts of a sum. Forward: all-reduce."""

    def __init__(self, tp: ParallelGroup, layer: str) -> None:
        self.tp, self.layer = tp, layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The sum."""

        def change(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return collectives.reduce_from_tp(leaf, self.tp, layer=self.layer)
            return leaf

        return pytree.tree_map(change, output)


@dataclass
class ArgumentHook:
    """A forward pre-hook: cuts out this rank's part of arguments, and sums gradients of others.

    Attributes:
        names: its positional arguments.
        summed: tensors of whose gradient a rank sees a part: an all-reduce in backward.
        taken: tensors of which a rank needs a part: dimension, period, and its indices.
    """

    tp: ParallelGroup
    layer: str
    names: tuple[str, ...]
    summed: frozenset[Key]
    taken: dict[Key, tuple[int, int, list[int]]] = field(default_factory=dict)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the module should see them."""

        def change(key: Key, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if key in self.taken:
                dim, period, indices = self.taken[key]
                # What another split module made for this rank is there already.
                if leaf.dim() > dim and leaf.shape[dim] % period == 0:
                    if leaf.requires_grad and torch.is_grad_enabled():
                        leaf = collectives.copy_to_tp(leaf, self.tp, layer=self.layer)
                    return take_periodic(leaf, dim, period, indices)
                return leaf
            if key in self.summed and leaf.requires_grad and torch.is_grad_enabled():
                return collectives.copy_to_tp(leaf, self.tp, layer=self.layer)
            return leaf

        wanted = {name for name, _ in (*self.summed, *self.taken)}
        call = ModuleCall(args, kwargs).mapped(self.names, change, only=wanted)
        return call.args, call.kwargs
