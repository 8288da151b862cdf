"""RMSNorm and LayerNorm whose parameter gradients are right wherever they stand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colrow.comm import collectives
from colrow.comm.autograd import apply
from colrow.comm.group import ParallelGroup
from colrow.layers.describe import NormSpec, unknown
from colrow.layers.described import Described
from colrow.layers.options import Norm
from colrow.layers.shared import SharedWeights
from colrow.partition import Partition


class _Norm(Described):
    """What the two norms share: a weight that every rank holds, maybe a bias.

    Args:
        size: length of the normalised (last) dimension.
        tp: the tensor-parallel group.
        eps: added to the variance.
        applied_to: "all" when every rank normalises the same tensor: nothing is sent. "shard" when
            each rank normalises its own part (its sequence shard, its heads): the gradients of
            the parameters are then summed over the ranks in backward.
        centred: the weight is what is added to 1, and starts at 0.
        wide: the weight multiplies before the result is rounded to the input's dtype.
        layer: name for messages and the ledger.
    """

    def __init__(
        self,
        size: int,
        tp: ParallelGroup,
        *,
        eps: float,
        applied_to: Literal["all", "shard"] = "all",
        bias: bool = False,
        centred: bool = False,
        wide: bool = False,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kind: Norm = "layernorm" if bias else "rmsnorm"  # which says whether there is a bias
        super().__init__(
            NormSpec(size, kind, centred=centred),
            tp,
            layer=layer,
            by_sequence=applied_to == "shard",
            device=device,
            dtype=dtype,
        )
        self.centred, self.wide = centred, wide
        self.size, self.eps = size, eps
        self.applied_to = applied_to

    def extra_repr(self) -> str:
        """Size, and over what the gradient is summed."""
        return f"{self.size}, eps={self.eps}, applied_to={self.applied_to}"


class RMSNorm(_Norm):
    """``x / rms(x) * weight`` over the last dimension (Zhang and Sennrich 2019).

    With ``centred`` it is ``x / rms(x) * (1 + weight)``. Computed in fp32 for narrower inputs; the
    result has the dtype of the input.
    """

    def forward(self, x: Tensor, *, shared: SharedWeights | None = None) -> Tensor:
        """``[..., size]`` to the same shape."""
        shared = shared or SharedWeights.of_layer(self)
        weight = _factor(shared(self, "weight"), self.centred)
        if self.wide and x.dtype.itemsize < 4:
            normed = F.rms_norm(x.float(), (self.size,), _widened(weight), self.eps)
            return normed.to(x.dtype)
        if x.is_cpu and not torch.compiler.is_compiling():
            if not torch.is_grad_enabled() and x.numel() == self.size:
                return normed_row(x, weight, self.eps)
            if torch.is_grad_enabled() and x.dtype == weight.dtype and x.dtype.itemsize >= 4:
                result: Tensor = apply(_RMSNorm, x, weight, self.eps)
                return result
        if x.dtype == weight.dtype and x.dtype.itemsize >= 4:
            return F.rms_norm(x, (self.size,), weight, self.eps)
        # Rounded before the weight is applied, as models are trained, and nothing wide is kept.
        wide = _widened(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed.to(x.dtype) * weight).to(x.dtype)


def normed_row(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:class:`RMSNorm` of a single row on a CPU, without gradient, in the fewest calls.

    ``[..., size]`` to the same shape.
    """
    wide = _widened(x.view(-1))
    return ((wide * rms_scale(wide, eps)).to(x.dtype) * weight).to(x.dtype).view(x.shape)


def rms_scale(x: Tensor, eps: float) -> float:
    """``1 / rms(x)`` of a row ``[size]`` in fp32 or fp64."""
    return 1 / math.sqrt(torch.dot(x, x).item() / x.numel() + eps)


class _RMSNorm(torch.autograd.Function):
    """For training on CPUs, where torch's RMS norm is single operations and so is its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x * x
        scale = y.mean(-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale, out=y).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = grad * normed
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            mean = (product @ weight).unsqueeze(-1) / weight.numel()
            dx = (grad * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        if ctx.needs_input_grad[1]:
            dweight = product.reshape(-1, weight.numel()).sum(0)
        return dx, dweight, None


class LayerNorm(_Norm):
    """``(x - mean) / std * weight + bias`` over the last dimension (Ba et al. 2016)."""

    def __init__(
        self,
        size: int,
        tp: ParallelGroup,
        *,
        eps: float,
        applied_to: Literal["all", "shard"] = "all",
        bias: bool = True,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            size,
            tp,
            eps=eps,
            applied_to=applied_to,
            bias=bias,
            layer=layer,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, *, shared: SharedWeights | None = None) -> Tensor:
        """``[..., size]`` to the same shape."""
        shared = shared or SharedWeights.of_layer(self)
        bias = None if self.bias is None else shared(self, "bias")
        return F.layer_norm(x, (self.size,), shared(self, "weight"), bias, self.eps)


class DividedRMSNorm(Described):
    """An RMS norm over features of which each rank has some: those of all heads together.

    The ranks add up the squares of what they have, see :func:`normed_together`. What several ranks
    have (keys that are read on both) counts once, and its weight's gradient is summed over them.

    Args:
        spec: with a ``partition``.
        tp: the tensor-parallel group.
        layer: name for messages and the ledger.

    Parameters: ``weight`` ``[size_local]``.
    """

    def __init__(
        self,
        spec: NormSpec,
        tp: ParallelGroup,
        *,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if spec.partition is None or spec.kind != "rmsnorm":
            raise ValueError(f"{layer}: an RMS norm with a partition is needed, not {spec}")
        super().__init__(spec, tp, layer=layer, device=device, dtype=dtype)
        self.spec = spec
        start, stop = spec.partition.bounds[tp.rank]
        before = max((end for _, end in spec.partition.bounds[: tp.rank]), default=start)
        self._first_counted = min(max(start, before), stop) - start

    def squares(self, x: Tensor) -> Tensor:
        """``[..., size_local]`` to this rank's part of the sum of squares, ``[...]``, in fp32."""
        return _widened(x[..., self._first_counted :]).square().sum(-1)

    def scaled(self, x: Tensor, squares: Tensor, shared: SharedWeights) -> Tensor:
        """The norm of ``[..., size_local]``, given the sum over all ranks, ``[...]``."""
        weight, wide = _factor(shared(self, "weight"), self.spec.centred), _widened(x)
        scale = torch.rsqrt(squares / self.spec.size + self.spec.eps).unsqueeze(-1)
        if self.spec.wide:
            return (wide * scale * weight).to(x.dtype)
        return ((wide * scale).to(x.dtype) * weight).to(x.dtype)

    def extra_repr(self) -> str:
        """Size held and in all."""
        return f"{self.weight.numel()} of {self.spec.size}, eps={self.spec.eps}"


def normed_together(
    norms: tuple[DividedRMSNorm, ...], values: tuple[Tensor, ...], shared: SharedWeights, layer: str
) -> tuple[Tensor, ...]:
    """Several divided norms, whose squares travel together.

    Communicates: an all-reduce of one number in fp32 (fp64 for fp64) for each norm and token, once
    in forward and once in backward.

    Args:
        values: ``[batch, sequence, heads_local, head_dim]`` for each of the norms.
        layer: name for the ledger.
    """
    tp, flat = norms[0].tp, [value.flatten(2) for value in values]
    mine = torch.stack([norm.squares(x) for norm, x in zip(norms, flat, strict=True)], dim=-1)
    # Every rank goes on with the sum, for features of its own: its gradient is a sum as well.
    total = collectives.copy_to_tp(
        collectives.reduce_from_tp(mine, tp, layer=layer), tp, layer=layer
    )
    return tuple(
        norm.scaled(x, squares, shared).view(value.shape)
        for norm, x, squares, value in zip(norms, flat, total.unbind(-1), values, strict=True)
    )


def head_norm(
    norm: NormSpec,
    tp: ParallelGroup,
    *,
    features: Partition | None,
    layer: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> RMSNorm | DividedRMSNorm:
    """The norm of queries or keys: of each head, or of all heads' features.

    Args:
        features: how the features of all heads are divided, for a norm over them; None for a norm
            over each head's.

    Raises:
        ValueError: a norm that is no RMS norm.
    """
    if norm.kind != "rmsnorm":
        unknown(norm, "attention")
    if features is not None:
        divided = replace(norm, partition=features)
        return DividedRMSNorm(divided, tp, layer=layer, device=device, dtype=dtype)
    return _rms_norm(norm, tp, "shard", layer=layer, device=device, dtype=dtype)


def hidden_norm(
    norm: NormSpec,
    tp: ParallelGroup,
    *,
    divided_sequence: bool,
    layer: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> RMSNorm | LayerNorm:
    """A norm over the hidden size, of whole sequences or of a shard of each.

    Raises:
        ValueError: a LayerNorm of a form that only RMS norms have.
    """
    applied_to: Literal["all", "shard"] = "shard" if divided_sequence else "all"
    if norm.kind == "rmsnorm":
        return _rms_norm(norm, tp, applied_to, layer=layer, device=device, dtype=dtype)
    if norm.centred or norm.wide:
        unknown(norm, "LayerNorm")
    return LayerNorm(
        norm.size, tp, eps=norm.eps, applied_to=applied_to, layer=layer, device=device, dtype=dtype
    )


def _rms_norm(
    norm: NormSpec,
    tp: ParallelGroup,
    applied_to: Literal["all", "shard"],
    *,
    layer: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> RMSNorm:
    return RMSNorm(
        norm.size,
        tp,
        eps=norm.eps,
        applied_to=applied_to,
        centred=norm.centred,
        wide=norm.wide,
        layer=layer,
        device=device,
        dtype=dtype,
    )


def _factor(weight: Tensor, centred: bool) -> Tensor:
    """What is multiplied with; a centred weight is what is added to 1."""
    return 1 + _widened(weight) if centred else weight


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()
