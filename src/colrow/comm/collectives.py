"""The autograd-aware collectives of tensor, sequence and expert parallelism.

===========================  ==============================  ================================
collective                   forward                         backward
===========================  ==============================  ================================
copy_to_tp                   identity                        all-reduce
reduce_from_tp               all-reduce                      identity
gather_from_tp               all-gather, last dim            split
scatter_to_tp                split, last dim                 all-gather
scatter_to_sequence          split, sequence dim             all-gather
gather_from_sequence         all-gather, sequence dim        reduce-scatter
reduce_scatter_to_sequence   reduce-scatter, sequence dim    all-gather
all_to_all                   rows to the ranks they are for  the same back
===========================  ==============================  ================================

The first four are f, g and their gathering relatives of Megatron-LM (Shoeybi et al. 2019, section
3); the next three those of sequence parallelism (Korthikanti et al. 2022, section 4.2.2); the last
is that of experts that lie on several ranks (Lepikhin et al. 2020, arXiv 2006.16668). Each backward
is the adjoint of its forward when a tensor that all ranks hold also has the same gradient on all of
them.

Shapes: the last dim of a tensor is features, the dim before it sequence (``[batch, sequence,
features]`` or ``[sequence, features]``). Any dtype that the backend reduces. With one rank each
is the identity. Inputs are never written to. ``partition`` says how the divided dimension lies over
the ranks. Without it a tensor that is split is divided as evenly as possible, and before a tensor
is gathered its ranks exchange their sizes (:func:`colrow.comm.primitives.exchange_sizes`), 8 bytes
a rank. ``layer`` is the name under which the ledger files the call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colrow.comm import point_to_point, primitives
from colrow.comm.autograd import apply
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Phase
from colrow.partition import Partition

SEQUENCE = -2
FEATURES = -1


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: ParallelGroup, layer: str) -> Tensor:
        ctx.tp, ctx.layer = tp, layer
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return primitives.all_reduce(grad, ctx.tp, layer=ctx.layer, phase="backward"), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: ParallelGroup, layer: str) -> Tensor:
        return primitives.all_reduce(x, tp, layer=layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


class _Gather(torch.autograd.Function):
    """All-gather along a dim; backward is the local range, or a reduce-scatter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tp: ParallelGroup,
        dim: int,
        partition: Partition,
        reduce_grad: bool,
        layer: str,
    ) -> Tensor:
        ctx.tp, ctx.dim, ctx.partition = tp, dim, partition
        ctx.reduce_grad, ctx.layer = reduce_grad, layer
        return primitives.all_gather(x, tp, dim, partition=partition, layer=layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.reduce_grad:
            mine = primitives.reduce_scatter(
                grad, ctx.tp, ctx.dim, partition=ctx.partition, layer=ctx.layer, phase="backward"
            )
        else:
            mine = primitives.local_range(grad, ctx.tp, ctx.dim, ctx.partition).contiguous()
        return mine, None, None, None, None, None


class _Scatter(torch.autograd.Function):
    """The local range along a dim, or a reduce-scatter; backward is an all-gather."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tp: ParallelGroup,
        dim: int,
        partition: Partition,
        reduce: bool,
        layer: str,
    ) -> Tensor:
        ctx.tp, ctx.dim, ctx.partition, ctx.layer = tp, dim, partition, layer
        if reduce:
            return primitives.reduce_scatter(x, tp, dim, partition=partition, layer=layer)
        return primitives.local_range(x, tp, dim, partition).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        whole = primitives.all_gather(
            grad, ctx.tp, ctx.dim, partition=ctx.partition, layer=ctx.layer, phase="backward"
        )
        return whole, None, None, None, None, None


def copy_to_tp(x: Tensor, tp: ParallelGroup, *, layer: str = "") -> Tensor:
    """Input of a column-parallel layer: ``x`` in forward, all-reduce of the gradient in backward.

    ``x``: the same tensor on every rank, any shape; so is the result.
    """
    if tp.size == 1:
        return x
    result: Tensor = apply(_Copy, x, tp, layer)
    return result


def reduce_from_tp(x: Tensor, tp: ParallelGroup, *, layer: str = "") -> Tensor:
    """Output of a row-parallel layer: the ranks' partial sums become one tensor on every rank."""
    if tp.size == 1:
        return x
    result: Tensor = apply(_Reduce, x, tp, layer)
    return result


def gather_from_tp(
    x: Tensor, tp: ParallelGroup, *, partition: Partition | None = None, layer: str = ""
) -> Tensor:
    """``[..., features_local]`` to ``[..., features]`` on every rank; backward keeps the own range.

    Raises:
        ValueError: when x's last dim is not this rank's size in ``partition``.
    """
    if tp.size == 1:
        return x
    partition = partition or primitives.exchange_sizes(x, tp, FEATURES, layer=layer)
    result: Tensor = apply(_Gather, x, tp, FEATURES, partition, False, layer)
    return result


def scatter_to_tp(
    x: Tensor, tp: ParallelGroup, *, partition: Partition | None = None, layer: str = ""
) -> Tensor:
    """``[..., features]``, the same on every rank, to ``[..., features_local]``.

    Raises:
        ValueError: when x's last dim is not the length of ``partition``.
    """
    if tp.size == 1:
        return x
    partition = partition or Partition.even(x.shape[FEATURES], tp.size)
    result: Tensor = apply(_Scatter, x, tp, FEATURES, partition, False, layer)
    return result


def scatter_to_sequence(
    x: Tensor, tp: ParallelGroup, *, partition: Partition | None = None, layer: str = ""
) -> Tensor:
    """``[..., sequence, features]``, whole on every rank, to ``[..., sequence_local, features]``.

    Enters the sequence-parallel region; backward gathers the gradient again.
    """
    if tp.size == 1:
        return x
    partition = partition or Partition.even(x.shape[SEQUENCE], tp.size)
    result: Tensor = apply(_Scatter, x, tp, SEQUENCE, partition, False, layer)
    return result


def gather_from_sequence(
    x: Tensor,
    tp: ParallelGroup,
    *,
    partition: Partition | None = None,
    partial_gradient: bool = True,
    layer: str = "",
) -> Tensor:
    """``[..., sequence_local, features]`` to ``[..., sequence, features]`` on every rank.

    Input of a column-parallel layer under sequence parallelism; backward reduce-scatters, since
    each rank then has only its columns' part of the gradient. Where every rank has the whole
    gradient (``partial_gradient=False``), backward takes the local range and sends nothing.
    """
    if tp.size == 1:
        return x
    partition = partition or primitives.exchange_sizes(x, tp, SEQUENCE, layer=layer)
    result: Tensor = apply(_Gather, x, tp, SEQUENCE, partition, partial_gradient, layer)
    return result


def reduce_scatter_to_sequence(
    x: Tensor, tp: ParallelGroup, *, partition: Partition | None = None, layer: str = ""
) -> Tensor:
    """Partial sums ``[..., sequence, features]`` to the sum, ``[..., sequence_local, features]``.

    Output of a row-parallel layer under sequence parallelism.
    """
    if tp.size == 1:
        return x
    partition = partition or Partition.even(x.shape[SEQUENCE], tp.size)
    result: Tensor = apply(_Scatter, x, tp, SEQUENCE, partition, True, layer)
    return result


class _AllToAll(torch.autograd.Function):
    """Rows to ranks; backward sends the gradients of what came back to where it came from."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: ParallelGroup,
        sent: tuple[int, ...],
        received: tuple[int, ...],
        layer: str,
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received, ctx.layer = group, sent, received, layer
        return _rows_exchanged(x, group, sent, received, layer, "forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mine = _rows_exchanged(grad, ctx.group, ctx.received, ctx.sent, ctx.layer, "backward")
        return mine, None, None, None, None


def _rows_exchanged(
    x: Tensor,
    group: ParallelGroup,
    sent: tuple[int, ...],
    received: tuple[int, ...],
    layer: str,
    phase: Phase,
) -> Tensor:
    width = math.prod(x.shape[1:])
    pieces = [piece.reshape(-1) for piece in x.split(list(sent))]
    sizes = [rows * width for rows in received]
    arrived = point_to_point.all_to_all(pieces, sizes, group, layer=layer, phase=phase)
    return torch.cat(arrived).view(sum(received), *x.shape[1:])


def all_to_all(
    x: Tensor,
    group: ParallelGroup,
    *,
    sent: Sequence[int],
    received: Sequence[int],
    layer: str = "",
) -> Tensor:
    """``[rows, ...]`` to the rows that are for this rank, those from rank 0 first.

    Args:
        x: this rank's rows, those for rank 0 first.
        sent: how many are for each rank; none is possible.
        received: how many come from each, which is what they say in ``sent``.

    Raises:
        ValueError: counts that are not one for each rank, or not those of the rows.
    """
    if len(sent) != group.size or len(received) != group.size or sum(sent) != x.shape[0]:
        raise ValueError(
            f"all_to_all of {x.shape[0]} rows over {group.size} ranks: sent={list(sent)} and "
            f"received={list(received)} should have a number for each rank, and those of sent "
            "should add up to the rows"
        )
    if group.size == 1:
        return x
    result: Tensor = apply(_AllToAll, x, group, tuple(sent), tuple(received), layer)
    return result
