"""Tensors as MPI sees them: addresses, counts, element types, reductions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

_TYPES = {
    torch.float64: MPI.DOUBLE,
    torch.float32: MPI.FLOAT,
    torch.int64: MPI.INT64_T,
    torch.int32: MPI.INT32_T,
    torch.int16: MPI.INT16_T,
    torch.int8: MPI.INT8_T,
    torch.uint8: MPI.UINT8_T,
    torch.bool: MPI.C_BOOL,
}
_REDUCED_AS = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
NARROW = tuple(_REDUCED_AS)
RedOpType = dist.ReduceOp.RedOpType
SUM: RedOpType = dist.ReduceOp.SUM
AVERAGE: RedOpType = dist.ReduceOp.AVG
_OPS = {
    dist.ReduceOp.SUM: MPI.SUM,
    dist.ReduceOp.AVG: MPI.SUM,
    dist.ReduceOp.PRODUCT: MPI.PROD,
    dist.ReduceOp.MIN: MPI.MIN,
    dist.ReduceOp.MAX: MPI.MAX,
    dist.ReduceOp.BAND: MPI.BAND,
    dist.ReduceOp.BOR: MPI.BOR,
    dist.ReduceOp.BXOR: MPI.BXOR,
}
_OPS_OF_BOOL = {
    dist.ReduceOp.SUM: MPI.LOR,
    dist.ReduceOp.MAX: MPI.LOR,
    dist.ReduceOp.BOR: MPI.LOR,
    dist.ReduceOp.PRODUCT: MPI.LAND,
    dist.ReduceOp.MIN: MPI.LAND,
    dist.ReduceOp.BAND: MPI.LAND,
    dist.ReduceOp.BXOR: MPI.LXOR,
}


def raw(x: Tensor) -> list[Any]:
    """The bytes of a contiguous tensor."""
    size = x.numel() * x.element_size()
    return [MPI.memory.fromaddress(x.data_ptr(), size), size, MPI.BYTE]


def typed(x: Tensor) -> list[Any]:
    """The elements of a contiguous tensor, for a reduction."""
    size = x.numel() * x.element_size()
    return [MPI.memory.fromaddress(x.data_ptr(), size), x.numel(), _TYPES[x.dtype]]


def reduced_in(dtype: torch.dtype) -> torch.dtype:
    """What this dtype is added up in: fp32 for 16-bit numbers.

    Raises:
        TypeError: for one that cannot be reduced.
    """
    dtype = _REDUCED_AS.get(dtype, dtype)
    if dtype not in _TYPES:
        raise TypeError(f"the MPI engine does not reduce {dtype}: use a real or integer type")
    return dtype


def operation(op: RedOpType, dtype: torch.dtype) -> MPI.Op:
    """MPI's name of a reduction; an average is a sum first.

    Raises:
        ValueError: for one that MPI does not have.
    """
    found = (_OPS_OF_BOOL if dtype == torch.bool else _OPS).get(op)
    if found is None:
        raise ValueError(f"the MPI engine does not know the reduction {op} of {dtype}")
    return found


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the two may overlap, which MPI forbids."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0


def check_size(what: str, x: Tensor, elements: int, like: Tensor) -> None:
    """MPI takes addresses and counts at their word, and would read and write beyond a tensor.

    Args:
        what: the collective, and which of its tensors ``x`` is.
        elements: that ``x`` must have.
        like: has the dtype that ``x`` must have.

    Raises:
        TypeError: for another dtype.
        ValueError: for another size.
    """
    if x.dtype != like.dtype:
        raise TypeError(f"{what} is {x.dtype}, but the other is {like.dtype}: give equal dtypes")
    if x.numel() != elements:
        raise ValueError(
            f"{what} of shape {tuple(x.shape)} has {x.numel()} elements, but needs {elements}"
        )


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copies without autograd's notice."""
    with torch.no_grad():
        target.copy_(source)
