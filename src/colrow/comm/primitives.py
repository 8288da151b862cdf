"""The raw collectives: no autograd, every shape, counted.

All tensors that colrow itself sends go through here or :mod:`colrow.comm.point_to_point`. DDP and
FSDP2 send theirs over dp, and a few small Python objects (host names at start-up, the outcome of a
checkpoint) are exchanged with torch.distributed directly.

Each has an asynchronous form: issue it, compute, then ``wait()`` for the result. Uneven shards are
padded to the largest one, since NCCL and Gloo have no fast form for unequal sizes. Inside
torch.compile the functional collectives of torch are used, which the compiler can capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.comm import compat
from colrow.comm.clock import Clock
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Phase
from colrow.partition import Partition

Reduction = Literal["sum", "max"]
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Pending:
    """A collective under way; ``wait`` returns its result, once."""

    def __init__(
        self,
        finish: Callable[[], Tensor],
        work: dist.Work | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._finish, self._work, self._clock = finish, work, clock
        if clock is not None:
            clock.issued()

    def wait(self) -> Tensor:
        """Blocks until the result is there (on CUDA: makes the current stream wait for it)."""
        if self._clock is not None:
            self._clock.blocked()
        if self._work is not None:
            self._work.wait()
        if self._clock is not None:
            self._clock.done()
        return self._finish()


def all_reduce(
    x: Tensor,
    tp: ParallelGroup,
    *,
    op: Reduction = "sum",
    layer: str = "",
    phase: Phase = "forward",
    in_place: bool = False,
) -> Tensor:
    """The sum (or maximum) over the ranks of equally shaped tensors, on every rank."""
    if tp.size == 1:
        return x
    if tp.ledger is not None or torch.compiler.is_compiling():
        return all_reduce_async(x, tp, op=op, layer=layer, phase=phase, in_place=in_place).wait()
    buffer = _written_to(x, in_place)
    compat.all_reduce_now(buffer, _OPS[op], tp.group)
    return buffer


def all_reduce_async(
    x: Tensor,
    tp: ParallelGroup,
    *,
    op: Reduction = "sum",
    layer: str = "",
    phase: Phase = "forward",
    in_place: bool = False,
) -> Pending:
    """As :func:`all_reduce`. With ``in_place`` a contiguous ``x`` becomes the result."""
    if tp.size == 1:
        return Pending(lambda: x)
    if torch.compiler.is_compiling():
        reduced = compat.functional_all_reduce(x.contiguous(), op, tp.group)
        return Pending(lambda: reduced)
    buffer = _written_to(x, in_place)
    clock = Clock.start("all_reduce", buffer, tp, layer, phase)
    work = compat.issue_all_reduce(buffer, _OPS[op], tp.group)
    return Pending(lambda: buffer, work, clock)


def _written_to(x: Tensor, in_place: bool) -> Tensor:
    """What an all-reduce of ``x`` writes its result to, which holds x's values: x, or a copy."""
    return x if in_place and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def all_gather(
    x: Tensor,
    tp: ParallelGroup,
    dim: int,
    *,
    partition: Partition | None = None,
    layer: str = "",
    phase: Phase = "forward",
) -> Tensor:
    """The ranks' shards side by side along ``dim``, on every rank.

    Args:
        x: this rank's shard.
        partition: how ``dim`` is divided; by default evenly, so that every shard has x's size.
    """
    return all_gather_async(x, tp, dim, partition=partition, layer=layer, phase=phase).wait()


def all_gather_async(
    x: Tensor,
    tp: ParallelGroup,
    dim: int,
    *,
    partition: Partition | None = None,
    layer: str = "",
    phase: Phase = "forward",
) -> Pending:
    """As :func:`all_gather`."""
    if tp.size == 1:
        return Pending(lambda: x)
    dim %= x.dim()
    sizes = _sizes(x, tp, dim, partition)
    largest = max(sizes)
    shard = _pad(x, dim, largest).contiguous()

    def assemble(gathered: Tensor) -> Tensor:
        parts = gathered.view(tp.size, *shard.shape)
        if min(sizes) == largest:
            whole = (*x.shape[:dim], largest * tp.size, *x.shape[dim + 1 :])
            return parts.movedim(0, dim).reshape(whole)
        return torch.cat([parts[r].narrow(dim, 0, n) for r, n in enumerate(sizes)], dim)

    if torch.compiler.is_compiling():
        if tp.cuda_by_gloo and x.is_cuda:  # it would take the GPU's address for the host's
            raise RuntimeError(
                f"torch.compile cannot gather CUDA tensors over Gloo ({layer}): use NCCL, which "
                "needs a GPU for each rank, or leave the layer uncompiled"
            )
        gathered = compat.functional_all_gather(shard.flatten(), 0, tp.group)
        return Pending(lambda: assemble(gathered))
    buffer = shard.new_empty(tp.size * shard.numel())
    clock = Clock.start("all_gather", buffer, tp, layer, phase)
    work = compat.issue_all_gather(buffer, shard.flatten(), tp.group)
    return Pending(lambda: assemble(buffer), work, clock)


def reduce_scatter(
    x: Tensor,
    tp: ParallelGroup,
    dim: int,
    *,
    partition: Partition | None = None,
    layer: str = "",
    phase: Phase = "forward",
) -> Tensor:
    """This rank's range along ``dim`` of the sum over the ranks of equally shaped tensors.

    Args:
        x: a whole tensor.
        partition: how ``dim`` is divided; by default as evenly as possible.
    """
    return reduce_scatter_async(x, tp, dim, partition=partition, layer=layer, phase=phase).wait()


def reduce_scatter_async(
    x: Tensor,
    tp: ParallelGroup,
    dim: int,
    *,
    partition: Partition | None = None,
    layer: str = "",
    phase: Phase = "forward",
) -> Pending:
    """As :func:`reduce_scatter`."""
    if tp.size == 1:
        return Pending(lambda: x)
    dim %= x.dim()
    partition = partition or Partition.even(x.shape[dim], tp.size)
    check_split(partition, tp)
    check_length(x, dim, partition.length, "the tensor to scatter")
    largest, mine = partition.largest, partition.size(tp.rank)
    pieces = [_pad(x.narrow(dim, a, b - a), dim, largest) for a, b in partition.bounds]
    stacked = torch.cat([piece.flatten() for piece in pieces])
    shape = pieces[0].shape

    def trim(reduced: Tensor) -> Tensor:
        return reduced.view(shape).narrow(dim, 0, mine)

    if torch.compiler.is_compiling():
        reduced = compat.functional_reduce_scatter(stacked, "sum", 0, tp.group)
        return Pending(lambda: trim(reduced))
    buffer = stacked.new_empty(stacked.numel() // tp.size)
    clock = Clock.start("reduce_scatter", stacked, tp, layer, phase)
    work = compat.issue_reduce_scatter(buffer, stacked, tp.group)
    return Pending(lambda: trim(buffer), work, clock)


def exchange_sizes(
    x: Tensor, tp: ParallelGroup, dim: int, *, layer: str = "", phase: Phase = "forward"
) -> Partition:
    """How ``dim`` is divided over the ranks, from the sizes of their shards.

    Sends one all-gather of 8 bytes a rank, whose result this reads: on CUDA that waits for the
    device, and it breaks torch.compile's graph. On meta equal shards are taken for granted.
    """
    size = x.shape[dim]
    if tp.size == 1 or x.is_meta:
        return Partition.from_sizes([size] * tp.size)
    mine = torch.tensor([size], device=x.device)
    return Partition.from_sizes(all_gather(mine, tp, 0, layer=layer, phase=phase).tolist())


def local_range(x: Tensor, tp: ParallelGroup, dim: int, partition: Partition | None) -> Tensor:
    """This rank's range of a whole tensor, as a view; nothing is sent."""
    partition = partition or Partition.even(x.shape[dim], tp.size)
    check_split(partition, tp)
    check_length(x, dim, partition.length, "the tensor to split")
    start, stop = partition.bounds[tp.rank]
    return x.narrow(dim, start, stop - start)


def check_parts(partition: Partition, tp: ParallelGroup) -> None:
    """Raises ValueError when the partition is not one over the ranks of this group."""
    if partition.parts != tp.size:
        raise ValueError(
            f"a partition over {partition.parts} ranks was given to a {tp.name} group of {tp.size}"
        )


def check_split(partition: Partition, tp: ParallelGroup) -> None:
    """As :func:`check_parts`, and when an index has several holders, which would count twice."""
    check_parts(partition, tp)
    if not partition.is_split:
        raise ValueError(
            f"the ranges {list(partition.bounds)} do not lie side by side in rank order; a "
            "dimension that is gathered, scattered or summed over must have one holder per index"
        )


def check_length(x: Tensor, dim: int, expected: int, what: str) -> None:
    """Raises ValueError when dimension ``dim`` of ``x`` does not have the expected length."""
    if x.shape[dim] != expected:
        raise ValueError(
            f"{what} has shape {tuple(x.shape)}: dimension {dim} should be {expected}, "
            f"not {x.shape[dim]}"
        )


def _sizes(x: Tensor, tp: ParallelGroup, dim: int, partition: Partition | None) -> tuple[int, ...]:
    if partition is None:
        return (x.shape[dim],) * tp.size
    check_split(partition, tp)
    check_length(x, dim, partition.size(tp.rank), f"the shard of {tp.name} rank {tp.rank}")
    return partition.sizes


def _pad(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    return torch.cat([x, x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :])], dim)
