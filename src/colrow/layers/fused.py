"""The matmuls of the parallel linear layers, with the collectives in their backward overlapped.

``overlap=False`` and torch.compile take the plain form: an autograd collective and ``F.linear``.
Both forms send the same and compute the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colrow.comm import collectives, primitives
from colrow.comm.autograd import apply
from colrow.comm.group import ParallelGroup
from colrow.partition import Partition
from colrow.sharding import Sharding

_PLAIN = Sharding()


def column_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tp: ParallelGroup,
    *,
    sequence: Partition | None = None,
    sharding: Sharding = _PLAIN,
    layer: str = "",
) -> Tensor:
    """``x W^T + b`` with this rank's output features.

    ============  ==========================================  ================================
    .             without ``sequence``                        with ``sequence``
    ============  ==========================================  ================================
    x             ``[..., in]``, on every rank                ``[..., sequence_local, in]``
    weight, bias  ``[out_local, in]``, ``[out_local]``        the same
    result        ``[..., out_local]``                        ``[..., sequence, out_local]``
    forward       -                                           all-gather x
    backward      all-reduce dx, hidden behind dW             reduce-scatter dx, hidden behind dW
    ============  ==========================================  ================================
    """
    if tp.size == 1 or (sequence is None and not torch.is_grad_enabled()):
        return F.linear(x, weight, bias)  # nothing to send, and nothing to differentiate
    # A gather that is repeated in backward has no plain form; the compiler captures the fused one.
    keep = sharding.keep_gathered_input
    plain = not sharding.overlap or (torch.compiler.is_compiling() and keep)
    if plain:
        x = _cast(x, _autocast(x))  # so that the collectives carry the narrow dtype here too
    if plain and sequence is None:
        return F.linear(collectives.copy_to_tp(x, tp, layer=layer), weight, bias)
    if plain:
        whole = collectives.gather_from_sequence(x, tp, partition=sequence, layer=layer)
        return F.linear(whole, weight, bias)
    y: Tensor = apply(
        _ColumnLinear,
        x,
        weight,
        bias,
        tp,
        sequence,
        keep,
        layer,
        _autocast(x),
    )
    return y


def row_linear(
    x: Tensor,
    weight: Tensor,
    tp: ParallelGroup,
    *,
    sequence: Partition | None = None,
    sharding: Sharding = _PLAIN,
    layer: str = "",
) -> Tensor:
    """The sum over ranks of ``x W^T``.

    ============  ==================================  =========================================
    .             without ``sequence``                with ``sequence``
    ============  ==================================  =========================================
    x             ``[..., in_local]``                 ``[..., sequence, in_local]``
    weight        ``[out, in_local]``                 the same
    result        ``[..., out]``, on every rank       ``[..., sequence_local, out]``
    forward       all-reduce                          reduce-scatter
    backward      -                                   all-gather of the gradient
    ============  ==================================  =========================================
    """
    if tp.size == 1:
        return F.linear(x, weight)
    if torch.compiler.is_compiling() or not sharding.overlap:
        partial = F.linear(x, weight)
        if sequence is None:
            return collectives.reduce_from_tp(partial, tp, layer=layer)
        return collectives.reduce_scatter_to_sequence(partial, tp, partition=sequence, layer=layer)
    if sequence is None and not torch.is_grad_enabled():
        x, weight = _cast(x, _autocast(x)), _cast(weight, _autocast(x))
        return primitives.all_reduce(F.linear(x, weight), tp, layer=layer, in_place=True)
    y: Tensor = apply(_RowLinear, x, weight, tp, sequence, layer, _autocast(x))
    return y


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tp: ParallelGroup,
        sequence: Partition | None,
        keep_gathered_input: bool,
        layer: str,
        autocast: torch.dtype | None,
    ) -> Tensor:
        ctx.tp, ctx.sequence, ctx.layer = tp, sequence, layer
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        x, weight = _cast(x, autocast), _cast(weight, autocast)
        bias = None if bias is None else _cast(bias, autocast)
        if sequence is None:
            whole, y = x, F.linear(x, weight, bias)
        else:
            whole = primitives.all_gather(x, tp, -2, partition=sequence, layer=layer)
            y = F.linear(whole, weight, bias)
        ctx.gather_again = sequence is not None and not keep_gathered_input
        ctx.save_for_backward(x if ctx.gather_again else whole, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tp: ParallelGroup = ctx.tp
        sequence: Partition | None = ctx.sequence
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        names = {"layer": ctx.layer, "phase": "backward"}
        gathering = pending = None
        if ctx.gather_again and need_weight:
            gathering = primitives.all_gather_async(x, tp, -2, partition=sequence, **names)
        if need_x:
            partial = grad @ weight
            if sequence is None:
                pending = primitives.all_reduce_async(partial, tp, in_place=True, **names)
            else:
                pending = primitives.reduce_scatter_async(
                    partial, tp, -2, partition=sequence, **names
                )
        if gathering is not None:
            x = gathering.wait()
        rows = _rows(grad)
        dweight = dbias = None
        if need_weight:
            dweight = (rows.t() @ _rows(x)).to(weight_dtype)
        if need_bias:
            dbias = rows.sum(0).to(bias_dtype)
        dx = None if pending is None else pending.wait().to(x_dtype)
        return dx, dweight, dbias, None, None, None, None, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        tp: ParallelGroup,
        sequence: Partition | None,
        layer: str,
        autocast: torch.dtype | None,
    ) -> Tensor:
        ctx.tp, ctx.sequence, ctx.layer = tp, sequence, layer
        ctx.dtypes = x.dtype, weight.dtype
        x, weight = _cast(x, autocast), _cast(weight, autocast)
        ctx.save_for_backward(x, weight)
        partial = F.linear(x, weight)
        if sequence is None:
            return primitives.all_reduce(partial, tp, layer=layer, in_place=True)
        return primitives.reduce_scatter(partial, tp, -2, partition=sequence, layer=layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        need_x = ctx.needs_input_grad[0]
        names = {"layer": ctx.layer, "phase": "backward"}
        dweight = None
        if ctx.sequence is not None:
            grad = primitives.all_gather(grad, ctx.tp, -2, partition=ctx.sequence, **names)
        dx = grad @ weight if need_x else None
        dx = None if dx is None else dx.to(x_dtype)
        if ctx.needs_input_grad[1]:
            rows = _rows(grad)
            dweight = (rows.t() @ _rows(x)).to(weight_dtype)
        return dx, dweight, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    """``[..., features]`` to ``[rows, features]``, also where a rank holds no feature."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _autocast(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on x's device, if it is on; it leaves fp64 alone."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)
