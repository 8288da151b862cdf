"""Weights laid out for decoding on a CPU, where one token's matmul is a walk through the weight.

fp32 and fp64: column by column, and multiplied by NumPy's OpenBLAS where a rank has one core, which
reads memory up to 1.4 times as fast for one token as torch's BLAS (docs/engine.md has the rates).
bf16: as they are for one row, where torch's own kernel is faster than oneDNN, and packed for
oneDNN's for several, a second copy of the weight. Weights that stay in the blocks of their file
stay as they are. Training wants none of it: its gradients and
optimiser state lie row by row, and OpenBLAS rounds large products a little worse.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._profiler import _RecordFunctionFast

from colrow.layers.quantised import QuantisedWeight

_TOKENS = 512  # what oneDNN lays the weight out for
_BLAS_DTYPES = (torch.float32, torch.float64)
BLAS_EVENT = "colrow::blas"  # the name of OpenBLAS's products in a profile


class Kernel:
    """``x W^T + b`` without a gradient, for a weight ``[out, in]``; this one is torch's own."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return F.linear(x, weight, bias)

    def row(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """``x W^T`` of one row ``[in]`` of the weight's dtype, into ``out``, ``[out]``."""
        return torch.mv(weight, x, out=out)

    def _one_row(self, x: Tensor, weight: Tensor) -> Tensor:
        """:meth:`row` of ``[..., in]`` with one row in all, into new memory."""
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        self.row(x.view(-1), weight, y.view(-1))
        return y


class BlasKernel(Kernel):
    """By NumPy's BLAS, which reads the weight in the order in which it lies."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        other = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
        if other or x.dtype != weight.dtype or not _for_blas(weight):
            return F.linear(x, weight, bias)
        features, width = weight.shape
        if x.numel() == width:
            y = self._one_row(x, weight)
        else:
            y = x.new_empty(*x.shape[:-1], features)
            _product(x.reshape(-1, width), weight, y.view(-1, features))
        return y if bias is None else y.add_(bias)

    def row(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """``x W^T`` of one row ``[in]`` of the weight's dtype, into ``out``, ``[out]``."""
        return _product(x, weight, out) if _for_blas(weight) else super().row(x, weight, out)


def _for_blas(weight: Tensor) -> bool:
    """Whether it still is what it was laid out as; modules can be moved and converted later."""
    return weight.is_cpu and weight.dtype in _BLAS_DTYPES


def _product(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    with _RecordFunctionFast(BLAS_EVENT):
        np.dot(x.detach().numpy(), weight.detach().numpy().T, out=out.numpy())
    return out


class PackedKernel(Kernel):
    """For a bf16 weight: torch's own for one row, a packed copy by oneDNN for several.

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
        """``[..., in]`` to ``[..., out]``."""
        if x.dtype != weight.dtype or torch.compiler.is_compiling():
            return F.linear(x, weight, bias)
        if x.numel() == weight.shape[1]:
            y = self._one_row(x, weight)
            return y if bias is None else y.add_(bias)
        if _state(weight) != self._of:
            return F.linear(x, weight, bias)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return result

    def row(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """``x W^T`` of one row ``[in]`` of the weight's dtype, into ``out``, ``[out]``.

        torch's kernel is only reached while oneDNN is switched off, for the process.
        """
        with _onednn_off:
            return super().row(x, weight, out)


class QuantisedKernel(Kernel):
    """For a weight that stays in the blocks of its file, see :mod:`colrow.layers.quantised`."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if not isinstance(weight, QuantisedWeight):  # another one has taken its place
            return F.linear(x, weight, bias)
        y = weight.product(x)
        return y if bias is None else y.add_(bias)

    def row(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """``x W^T`` of one row ``[in]`` of the weight's dtype, into ``out``, ``[out]``."""
        if not isinstance(weight, QuantisedWeight):
            return super().row(x, weight, out)
        if x.dtype != torch.float32:
            return out.copy_(weight.product(x))
        weight.few_rows(x, out)
        return out


class _OneDnnOff:
    """Inside it oneDNN is switched off, for the process; any number of threads may be inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._before = 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch._C._get_mkldnn_enabled()
                torch._C._set_mkldnn_enabled(False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch._C._set_mkldnn_enabled(self._before)


_onednn_off = _OneDnnOff()


def _state(weight: Tensor) -> tuple[int, int]:
    """Where a weight is and how often it was written to; inference tensors do not count that."""
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


def lay_out_(weight: nn.Parameter, *, blas: bool) -> Kernel | None:
    """Stores a weight ``[out, in]`` as decoding wants it; shape and values stay.

    Args:
        blas: multiply with NumPy's BLAS, see :func:`has_fast_blas`.

    Returns:
        What to multiply with; None where :func:`torch.nn.functional.linear` will do, and for bf16
        weights made in inference mode, whose changes nobody counts.
    """
    if isinstance(weight, QuantisedWeight):
        return QuantisedKernel()
    if weight.device.type != "cpu":
        return None
    if weight.dtype in _BLAS_DTYPES:
        if blas or weight.shape[0] >= weight.shape[1]:  # torch reads long rows as fast as columns
            weight.data = weight.data.t().contiguous().t()
        return BlasKernel() if blas else None
    if weight.dtype != torch.bfloat16 or weight.is_inference() or not _has_packed_kernels():
        return None
    return PackedKernel(weight)


def has_fast_blas() -> bool:
    """Whether NumPy calls OpenBLAS here, on one thread, and torch has one too.

    With more threads the two libraries' would wait for each other's cores. threadpoolctl, of the
    ``cpu`` extra, knows; without it the answer is no.
    """
    if torch.get_num_threads() != 1:
        return False
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return False
    blas = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    found = [p["internal_api"] == "openblas" and p["num_threads"] == 1 for p in blas]
    return bool(found) and all(found)


def _has_packed_kernels() -> bool:
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported
    return bool(supported) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
