"""Gradients that are sums over ranks, as nodes of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colrow.comm import primitives
from colrow.comm.autograd import apply
from colrow.comm.group import ParallelGroup
from colrow.layers.shared import SharedRows


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tp: ParallelGroup, rows: SharedRows, dim: int, layer: str
    ) -> Tensor:
        ctx.tp, ctx.rows, ctx.dim, ctx.layer = tp, rows, dim, layer
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows: SharedRows = ctx.rows
        first = grad.movedim(ctx.dim, 0)
        buffer = first.new_zeros(rows.total, *first.shape[1:])
        for local, start, count in rows.pieces:
            buffer[start : start + count] = first[local : local + count]
        total = primitives.all_reduce(
            buffer, ctx.tp, layer=ctx.layer, phase="backward", in_place=True
        )
        result = first.clone()
        for local, start, count in rows.pieces:
            result[local : local + count] = total[start : start + count]
        return result.movedim(0, ctx.dim), None, None, None, None


def sum_rows(x: Tensor, tp: ParallelGroup, rows: SharedRows, dim: int, layer: str) -> Tensor:
    """``x``; in backward the gradient of the rows that several ranks hold is summed over them.

    Args:
        x: a parameter's shard.
        rows: which of its indices along ``dim`` other ranks hold too.
        dim: the dimension that is divided.
    """
    if tp.size == 1 or not rows.total or not x.requires_grad or not torch.is_grad_enabled():
        return x
    result: Tensor = apply(_SumRows, x, tp, rows, dim, layer)
    return result


class _SumTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tp: ParallelGroup, layer: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.tp, ctx.layer = tp, layer
        ctx.likes = [(x.shape, x.dtype, x.device) for x in tensors]
        # Not views, which would keep the tensors alive.
        return tuple(x.detach() for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parts = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.likes, strict=True)
        ]
        buffer = torch.cat([part.flatten() for part in parts])
        total = primitives.all_reduce(
            buffer, ctx.tp, layer=ctx.layer, phase="backward", in_place=True
        )
        sums = total.split([part.numel() for part in parts])
        return None, None, *(x.view(part.shape) for x, part in zip(sums, parts, strict=True))


def sum_together(tensors: list[Tensor], tp: ParallelGroup, layer: str) -> list[Tensor]:
    """The tensors, of one dtype; in backward the gradients of all are summed in one all-reduce."""
    return list(apply(_SumTogether, tp, layer, *tensors))
