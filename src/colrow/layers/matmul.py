"""Which library multiplies matrices on a CPU, where nothing is differentiated.

PyTorch gives fp32 products to MKL, which leaves the AVX-512 units of other makers' processors
unused; oneDNN, which PyTorch carries too, uses them. Autograd nodes call this in their own forward
and backward; where a gradient is asked for, it is :func:`torch.nn.functional.linear`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Fewer rows are a walk through the weight, for which the call itself costs more than is gained.
_ROWS = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``: ``[..., in]``, ``[out, in]`` and ``[out]`` to ``[..., out]``."""
    if (
        x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.numel() < _ROWS * x.shape[-1]
        or not x.is_cpu
        or not weight.numel()
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not _onednn_is_faster()
    ):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """``g W``, the gradient of a linear layer's input: ``[..., out]`` to ``[..., in]``."""
    return linear(grad, weight.t())


@cache
def _onednn_is_faster() -> bool:
    """By the processor alone, so that every run and every rank of a host decides alike."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "GenuineIntel" not in processor
