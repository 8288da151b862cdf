"""Weights laid out for decoding on a CPU, where one token's matmul is a walk through the weight.

fp32 and fp64: column by column, which keeps the vector units on one stream (PyTorch's BLAS runs up
to twice as fast so, and large batches as fast as before). bf16: packed for oneDNN's kernels, which
fill their registers without converting; a second copy of the weight. Training wants neither: its
gradients and optimiser state lie row by row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TOKENS = 512  # what oneDNN lays the weight out for; measured to be the fastest for one token too


class Kernel:
    """``x W^T + b`` on a packed copy of a bf16 weight.

    A weight that has changed since, or another one, is multiplied with as it is: the copy is then
    of no use. What is written through ``weight.data`` is not noticed, as autograd does not either:
    lay the weight out again after it.
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TOKENS)
        self._of = _state(weight)
        self._held = weight.detach()  # so that no other weight comes to lie at its address

    def __reduce__(self) -> Any:
        """Nothing: it belongs to this weight, and not to a copy of it."""
        return type(None), ()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[..., in]`` to ``[..., out]``; has no gradient."""
        if x.dtype != weight.dtype or _state(weight) != self._of:
            return F.linear(x, weight, bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return y


def _state(weight: Tensor) -> tuple[int, int]:
    """Where a weight is and how often it was written to; inference tensors do not count that."""
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


def lay_out_(weight: nn.Parameter) -> Kernel | None:
    """Stores a weight ``[out, in]`` as decoding wants it; shape and values stay.

    Returns:
        For bf16 where oneDNN is there, what multiplies with a packed copy; else None, and for
        weights made in inference mode, whose changes nobody counts:
        :func:`torch.nn.functional.linear` will do.
    """
    if weight.device.type != "cpu":
        return None
    if weight.dtype in (torch.float32, torch.float64):
        if weight.shape[0] >= weight.shape[1]:  # short rows; long ones stream as well as columns
            weight.data = weight.data.t().contiguous().t()
        return None
    if weight.dtype != torch.bfloat16 or weight.is_inference() or not _has_packed_kernels():
        return None
    return Kernel(weight)


def _has_packed_kernels() -> bool:
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported
    return bool(supported) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
