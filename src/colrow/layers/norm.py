"""RMSNorm and LayerNorm whose parameter gradients are right wherever they stand."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from colrow.comm.autograd import apply
from colrow.comm.group import ParallelGroup
from colrow.layers.describe import NormSpec, unknown
from colrow.layers.described import Described
from colrow.layers.options import Norm
from colrow.layers.shared import SharedWeights


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
        weight = factor(shared(self, "weight"), self.centred)
        if self.wide and x.dtype.itemsize < 4:
            normed = F.rms_norm(x.float(), (self.size,), widened(weight), self.eps)
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
        wide = widened(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed.to(x.dtype) * weight).to(x.dtype)


def normed_row(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:class:`RMSNorm` of a single row on a CPU, without gradient, in the fewest calls.

    ``[..., size]`` to the same shape.
    """
    wide = widened(x.view(-1))
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
        return rms_norm(norm, tp, applied_to, layer=layer, device=device, dtype=dtype)
    if norm.centred or norm.wide or norm.heads:
        unknown(norm, "LayerNorm")
    return LayerNorm(
        norm.size,
        tp,
        eps=norm.eps,
        applied_to=applied_to,
        bias=norm.bias,
        layer=layer,
        device=device,
        dtype=dtype,
    )


def rms_norm(
    norm: NormSpec,
    tp: ParallelGroup,
    applied_to: Literal["all", "shard"],
    *,
    layer: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> RMSNorm:
    """An RMS norm as described."""
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


def factor(weight: Tensor, centred: bool) -> Tensor:
    """What is multiplied with; a centred weight is what is added to 1."""
    return 1 + widened(weight) if centred else weight


def widened(x: Tensor) -> Tensor:
    """In fp32 where it is narrower."""
    return x if x.dtype.itemsize >= 4 else x.float()
