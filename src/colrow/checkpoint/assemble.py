"""Whole tensors from the ranks' shards, under the names of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.checkpoint.naming import hf_naming, pieces
from colrow.comm import primitives
from colrow.inplace.assemble import assemble
from colrow.inplace.record import record_of
from colrow.mesh import ParallelGroup
from colrow.models.decoder import Decoder


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights on tp rank 0, on the CPU; an empty dict on the other ranks.

    A tied head is not listed, as in transformers' saved files.

    Communicates: every rank sends its shards to rank 0, parameter by parameter; all ranks of the
    group must call it. What FSDP2 divides is gathered over dp first.
    """
    return _assemble(model, lambda parameter: parameter.detach())


def full_grads(model: nn.Module) -> dict[str, Tensor]:
    """The whole gradients on tp rank 0, as :func:`full_state_dict`; parameters without one are
    left out."""
    return _assemble(model, lambda parameter: parameter.grad)


@torch.no_grad()
def _assemble(
    model: nn.Module, value: Callable[[nn.Parameter], Tensor | None]
) -> dict[str, Tensor]:
    if (record := record_of(model)) is not None:
        return assemble(model, record, value)
    if not isinstance(model, Decoder):
        raise TypeError(
            f"{type(model).__name__} is neither colrow's decoder nor a model that "
            "colrow.parallelize has split"
        )
    naming, tp = hf_naming(model.config), model.tp
    whole: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        shard = value(parameter)
        if shard is None:
            continue
        if isinstance(shard, DTensor):  # FSDP2's rows of it, which come together over dp
            shard = shard.full_tensor()
        spec = model.specs[name]
        shapes = [spec.local_shape(rank) for rank in range(tp.size)]
        if spec.dim is None:
            shapes = shapes[:1]
        for rank, part in enumerate(_collect(shard, shapes, tp, name)):
            for piece in pieces(naming, model.config, name, spec, rank):
                if piece.name not in whole:
                    whole[piece.name] = part.new_empty(piece.shape)
                target = whole[piece.name]
                if piece.dim is None:
                    target.copy_(part)
                    continue
                assert spec.dim is not None
                start, stop = piece.target
                source = part.narrow(spec.dim, start, stop - start)
                source = source.t() if piece.transposed else source
                taken = 0
                for first, last in piece.ranges:
                    target.narrow(piece.dim, first, last - first).copy_(
                        source.narrow(piece.dim, taken, last - first)
                    )
                    taken += last - first
    return whole


def _collect(
    shard: Tensor, shapes: list[tuple[int, ...]], tp: ParallelGroup, name: str
) -> list[Tensor]:
    """The shards of these shapes, of ranks 0, 1, ..., on rank 0's CPU; nothing elsewhere."""
    if tp.rank >= len(shapes):
        return []
    if tp.rank > 0:
        primitives.send(shard, tp, 0, layer=name)
        return []
    parts = [shard.cpu()]
    for rank in range(1, len(shapes)):
        buffer = primitives.recv(shard.new_empty(shapes[rank]), tp, rank, layer=name)
        parts.append(buffer.cpu())
    return parts
