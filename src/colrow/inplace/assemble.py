"""Whole tensors of a parallelised model, on rank 0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.checkpoint.same import Held, check_same, owner_of
from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.inplace.record import Record
from colrow.partition import ShardSpec


@torch.no_grad()
def assemble(
    model: nn.Module,
    record: Record,
    value: Callable[[nn.Parameter], Tensor | None],
    *,
    rounds: bool = False,
) -> dict[str, Tensor]:
    """A tensor for every parameter of a parallelised model, whole, under the parameter's name.

    On tp rank 0, on the CPU; nothing on the other ranks. Communicates: every rank sends its shards
    to rank 0, parameter by parameter; before that the ranks compare what is not divided.

    Args:
        rounds: the values may differ by rounding, as gradients.

    Raises:
        ValueError: parameters that are not divided, or were added after the split, differ.
    """
    whole: dict[str, Tensor] = {}
    named = {n: value(p) for n, p in model.named_parameters() if n not in record.specs}
    check_same(
        (Held(n, v, n in record.names, owner_of(model, n)) for n, v in named.items()),
        record.tp,
        rounds=rounds,
    )
    for name, parameter in model.named_parameters():
        shard = value(parameter)
        if shard is None:
            continue
        if isinstance(shard, DTensor):
            shard = shard.full_tensor()
        spec = record.specs.get(name)
        if spec is None:
            if record.tp.rank == 0:
                whole[name] = shard.cpu()
            continue
        joined = join(shard, spec, record.tp, layer=name)
        if joined is not None:
            whole[name] = joined
    return whole


def join(shard: Tensor, spec: ShardSpec, tp: ParallelGroup, *, layer: str = "") -> Tensor | None:
    """The whole tensor on rank 0 from every rank's shard, a message each; None on the others."""
    assert spec.dim is not None
    if tp.rank > 0:
        primitives.send(shard, tp, 0, layer=layer)
        return None
    whole = torch.empty(spec.shape, dtype=shard.dtype)
    for rank in range(tp.size):
        part = shard
        if rank:
            part = shard.new_empty(spec.local_shape(rank))
            part = primitives.recv(part, tp, rank, layer=layer)
        taken = 0
        for start, stop in spec.global_ranges(rank):
            piece = part.narrow(spec.dim, taken, stop - start)
            whole.narrow(spec.dim, start, stop - start).copy_(piece)
            taken += stop - start
    return whole
