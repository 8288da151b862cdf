"""Gradients of parameters that several ranks hold, summed in one bucketed all-reduce.

Most replicated parameters need nothing: their ranks compute the same gradient from the same
activations. Three kinds see only a part of them and need the sum: parameters applied to a sequence
shard (norms and row biases under sequence parallelism), parameters applied to local heads (q and k
norms), and the rows of KV heads that several ranks hold.

The sum is a node of the autograd graph between the parameter and its users, so it is right with
gradient accumulation, recomputation, DDP, FSDP2, torch.autograd.grad and torch.compile alike, and
nobody has to remember it. A layer used alone inserts its own node; a model inserts one node for all
its layers and hands them the resulting :class:`SharedWeights`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from colrow.comm.autograd import apply
from colrow.comm.bucket import all_reduce_together
from colrow.comm.group import ParallelGroup
from colrow.layers.shared_rows import SharedRows


@dataclass(frozen=True)
class SharedParameter:
    """A parameter and the rows of it whose gradient is a sum over ranks.

    Attributes:
        module, name: where it is. The parameter itself may be replaced (``to``, ``load_state_dict``
            with ``assign``, FSDP2) or be computed from others (``torch.nn.utils.parametrize``).
        rows: the rows in question.
    """

    module: nn.Module
    name: str
    rows: SharedRows


@runtime_checkable
class HasSharedParameters(Protocol):
    """A layer of which some parameters' gradients are sums over ranks."""

    tp: ParallelGroup
    layer: str

    def shared_parameters(self) -> list[SharedParameter]:
        """The parameters in question; frozen ones may be among them."""
        ...


class SharedWeights:
    """Parameters as their users should see them: with the gradient sum in between.

    Args:
        aliases: by module and name, the parameters behind the gradient sum.
        layers: the modules whose shared parameters are all in ``aliases``, or need no sum; None for
            every module.
    """

    def __init__(
        self,
        aliases: dict[tuple[nn.Module, str], Tensor],
        layers: frozenset[nn.Module] | None = None,
    ) -> None:
        self._aliases, self._layers = aliases, layers

    def __call__(self, module: nn.Module, name: str) -> Tensor:
        """The module's parameter of this name, or its alias behind the gradient sum."""
        alias = self._aliases.get((module, name))
        if alias is not None:
            return alias
        unknown = self._layers is not None and module not in self._layers
        if unknown and isinstance(module, HasSharedParameters):
            return SharedWeights.of_layer(module)(module, name)
        parameter: Tensor = getattr(module, name)
        return parameter

    @classmethod
    def of_layer(cls, layer: HasSharedParameters) -> SharedWeights:
        """For a layer used alone: its own parameters."""
        return cls.of_parameters(layer.shared_parameters(), layer.tp, layer.layer)

    @classmethod
    def of_parameters(
        cls,
        shared: Sequence[SharedParameter],
        tp: ParallelGroup,
        layer: str,
        *,
        layers: frozenset[nn.Module] | None = None,
    ) -> SharedWeights:
        """One bucket for these parameters, filed under ``layer``; tied parameters count once."""
        if tp.size == 1 or not torch.is_grad_enabled():
            return cls({})
        places: list[tuple[nn.Module, str, int]] = []  # and which of the bucket's tensors it is
        tensors: list[Tensor] = []
        rows: list[SharedRows] = []
        numbers: dict[int, int] = {}  # by id of a tensor that ``tensors`` keeps alive
        for one in shared:
            tensor: Tensor = getattr(one.module, one.name)
            if not tensor.requires_grad or not one.rows.total:
                continue
            number = numbers.setdefault(id(tensor), len(tensors))
            if number == len(tensors):
                tensors.append(tensor)
                rows.append(one.rows)
            places.append((one.module, one.name, number))
        if not tensors:
            return cls({}, layers)
        aliases: tuple[Tensor, ...] = apply(_SumGradients, tp, layer, rows, *tensors)
        return cls({(module, name): aliases[n] for module, name, n in places}, layers)


class SharedLayers:
    """The layers inside a model that may have shared parameters, found once.

    What is found are modules and not their parameters, which may be replaced at any time. A layer
    that joins the model later makes a gradient sum of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found = list(_layers(model, ()))

    def all(self) -> list[SharedParameter]:
        """The shared parameters of all of them."""
        return [at for _, found in self._found for at in found.shared_parameters()]

    def weights(self, tp: ParallelGroup, layer: str) -> SharedWeights:
        """Their parameters as they are now, in one bucket that is filed under ``layer``.

        Modules inside the model that have ``own_bucket`` set are left to make theirs.
        """
        if tp.size == 1 or not torch.is_grad_enabled():
            return SharedWeights({})
        layers = [
            found
            for owners, found in self._found
            if not any(getattr(owner, "own_bucket", False) for owner in owners)
        ]
        shared = [parameter for found in layers for parameter in found.shared_parameters()]
        modules = frozenset(found for found in layers if isinstance(found, nn.Module))
        return SharedWeights.of_parameters(shared, tp, layer, layers=modules)


@torch.no_grad()
def sum_gradients_(
    shared: Sequence[SharedParameter], tp: ParallelGroup, *, layer: str = "shared"
) -> None:
    """The sum of the graph's node, made afterwards: for users that took the bare parameters.

    Communicates: one all-reduce of the shared rows of all gradients; a gradient that is None counts
    as zero.
    """
    if tp.size == 1:
        return
    found: dict[int, tuple[Tensor, SharedRows]] = {}
    for one in shared:
        parameter: Tensor = getattr(one.module, one.name)
        if parameter.requires_grad and one.rows.total:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found[id(parameter)] = parameter.grad, one.rows
    if not found:
        return
    parts = [rows.pack(grad) for grad, rows in found.values()]
    sums = all_reduce_together(parts, tp, layer=layer)
    for (grad, rows), total in zip(found.values(), sums, strict=True):
        grad.copy_(rows.unpack(grad, total))


def sum_rows(x: Tensor, tp: ParallelGroup, rows: SharedRows, dim: int, layer: str) -> Tensor:
    """``x``; in backward the gradient of the rows that several ranks hold is summed over them.

    Args:
        x: a parameter's shard.
        rows: which of its indices along ``dim`` other ranks hold too.
        dim: the dimension that is divided.
    """
    if tp.size == 1 or not rows.total or not x.requires_grad or not torch.is_grad_enabled():
        return x
    (alias,) = apply(_SumGradients, tp, layer, [rows], x.movedim(dim, 0))
    result: Tensor = alias.movedim(0, dim)
    return result


def sum_together(tensors: list[Tensor], tp: ParallelGroup, layer: str) -> list[Tensor]:
    """The tensors, of one dtype; in backward the gradients of all are summed in one all-reduce."""
    rows = [SharedRows.whole(x.shape[0]) for x in tensors]
    return list(apply(_SumGradients, tp, layer, rows, *tensors))


def _layers(
    module: nn.Module, owners: tuple[nn.Module, ...]
) -> Iterator[tuple[tuple[nn.Module, ...], HasSharedParameters]]:
    """Every layer below ``module``, and those modules on the way that could have a bucket."""
    if isinstance(module, HasSharedParameters):
        yield owners, module
    for child in module.children():
        could = hasattr(child, "own_bucket")
        yield from _layers(child, (*owners, child) if could else owners)


class _SumGradients(torch.autograd.Function):
    """Tensors in, their aliases out; backward all-reduces the shared rows of all gradients."""

    @staticmethod
    def forward(
        ctx: Any, tp: ParallelGroup, layer: str, rows: list[SharedRows], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.tp, ctx.layer, ctx.rows = tp, layer, rows
        # Not views, which would keep activations alive.
        return tuple(parameter.detach() for parameter in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows: list[SharedRows] = ctx.rows
        dtype = grads[0].dtype
        for grad in grads:
            dtype = torch.promote_types(dtype, grad.dtype)
        parts = [r.pack(grad).to(dtype) for grad, r in zip(grads, rows, strict=True)]
        sums = all_reduce_together(parts, ctx.tp, layer=ctx.layer)
        found = (
            r.unpack(grad, total.to(grad.dtype))
            for grad, total, r in zip(grads, sums, rows, strict=True)
        )
        return None, None, None, *found
