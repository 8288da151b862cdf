"""Weights laid out for decoding on a CPU, where one token's matmul is a walk through the weight.

fp32 and fp64: column by column, which keeps the vector units on one stream (PyTorch's BLAS runs up
to twice as fast so, and large batches as fast as before). bf16: packed for oneDNN's kernels, which
fill their registers without converting; a second copy of the weight. Training wants neither: its
gradients and optimiser state lie row by row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Kernel = Callable[[Tensor, Tensor | None], Tensor]

_TOKENS = 512  # what oneDNN lays the weight out for; measured to be the fastest for one token too


def lay_out_(weight: nn.Parameter) -> Kernel | None:
    """Stores a weight ``[out, in]`` as decoding wants it; shape and values stay.

    Returns:
        For bf16 where oneDNN is there, ``(x, bias) -> x W^T + b`` on the packed copy, which later
        changes of the weight do not reach; else None: :func:`torch.nn.functional.linear` will do.
    """
    if weight.device.type != "cpu":
        return None
    if weight.dtype in (torch.float32, torch.float64):
        if weight.shape[0] >= weight.shape[1]:  # short rows; long ones stream as well as columns
            weight.data = weight.data.t().contiguous().t()
        return None
    if weight.dtype != torch.bfloat16 or not _has_packed_kernels():
        return None
    with torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TOKENS)

    def kernel(x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return y

    return kernel


def _has_packed_kernels() -> bool:
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported
    return bool(supported) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
