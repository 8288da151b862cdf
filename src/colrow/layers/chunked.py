"""Matmul and collective in chunks: the collective of one runs behind the matmul of the next.

The idea is that of Wang et al. 2023, "Overlap Communication with Dependent Computation via
Decomposition in Large Deep Learning Models", section 4, with the engine's collectives in place of
its ring of messages. Nothing here has a gradient: the layers' autograd nodes call it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Phase
from colrow.layers.chunks import chunk_count, chunk_partition, row_chunks, sequence_chunks
from colrow.partition import Partition


def linear_all_reduce(
    x: Tensor, weight: Tensor, tp: ParallelGroup, *, chunk_bytes: int | None, layer: str
) -> Tensor:
    """The sum over ranks of ``x W^T``: ``[..., in_local]`` to ``[..., out]``.

    Sends an all-reduce of the result, or one for each chunk of its rows.
    """
    rows = x.shape[:-1].numel()
    size = rows * weight.shape[0] * x.element_size()
    chunks = chunk_count(size, rows, chunk_bytes)
    if chunks == 1:
        return primitives.all_reduce(F.linear(x, weight), tp, layer=layer, in_place=True)
    flat = x.reshape(rows, x.shape[-1])
    result = x.new_empty(rows, weight.shape[0])
    pending = []
    for start, stop in row_chunks(rows, chunks):
        part = result[start:stop]
        torch.mm(flat[start:stop], weight.t(), out=part)
        pending.append(primitives.all_reduce_async(part, tp, layer=layer, in_place=True))
    for one in pending:
        one.wait()
    return result.view(*x.shape[:-1], weight.shape[0])


def linear_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    tp: ParallelGroup,
    sequence: Partition,
    *,
    chunk_bytes: int | None,
    layer: str,
) -> Tensor:
    """This rank's positions of the sum of ``x W^T``.

    ``[..., sequence, in_local]`` to ``[..., sequence_local, out]``. Sends a reduce-scatter, or one
    for each chunk of the sequence.
    """
    chunks = _sequence_chunks(x, weight.shape[0], sequence, chunk_bytes)
    if len(chunks) == 1:
        return primitives.reduce_scatter(
            F.linear(x, weight), tp, -2, partition=sequence, layer=layer
        )
    pending = []
    for ranges in chunks:
        part = torch.cat([x[..., start:stop, :] for start, stop in ranges], dim=-2)
        pending.append(
            primitives.reduce_scatter_async(
                F.linear(part, weight), tp, -2, partition=chunk_partition(ranges), layer=layer
            )
        )
    return torch.cat([one.wait() for one in pending], dim=-2)


def gather_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tp: ParallelGroup,
    sequence: Partition,
    *,
    chunk_bytes: int | None,
    layer: str,
    phase: Phase = "forward",
) -> tuple[Tensor, Tensor]:
    """All ranks' ``x``, ``[..., sequence, in]``, and ``x W^T + b`` of it.

    ``x`` is ``[..., sequence_local, in]``. Sends an all-gather of it, or one for each chunk of the
    sequence.
    """
    chunks = _sequence_chunks(x, x.shape[-1], sequence, chunk_bytes)
    if len(chunks) == 1:
        whole = primitives.all_gather(x, tp, -2, partition=sequence, layer=layer, phase=phase)
        return whole, F.linear(whole, weight, bias)
    first = sequence.bounds[tp.rank][0]
    pending = []
    for ranges in chunks:
        start, stop = ranges[tp.rank]
        shard = x[..., start - first : stop - first, :]
        pending.append(
            primitives.all_gather_async(
                shard, tp, -2, partition=chunk_partition(ranges), layer=layer, phase=phase
            )
        )
    whole = x.new_empty(*x.shape[:-2], sequence.length, x.shape[-1])
    result = x.new_empty(*x.shape[:-2], sequence.length, weight.shape[0])
    for one, ranges in zip(pending, chunks, strict=True):
        part = one.wait()
        product = F.linear(part, weight, bias)
        taken = 0
        for start, stop in ranges:
            rows = slice(taken, taken + stop - start)
            whole[..., start:stop, :] = part[..., rows, :]
            result[..., start:stop, :] = product[..., rows, :]
            taken = rows.stop
    return whole, result


def _sequence_chunks(
    x: Tensor, features: int, sequence: Partition, chunk_bytes: int | None
) -> list[tuple[tuple[int, int], ...]]:
    """The chunks of a message with the whole sequence in it, padding of uneven shards included."""
    outer = x.shape[:-2].numel()
    padded = sequence.largest * sequence.parts
    size = outer * padded * features * x.element_size()
    return sequence_chunks(sequence, chunk_count(size, min(sequence.sizes), chunk_bytes))
