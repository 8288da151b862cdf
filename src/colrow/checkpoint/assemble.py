"""Whole tensors from the ranks' shards, under the names of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.checkpoint.naming import hf_naming, pieces
from colrow.checkpoint.same import Held, check_same
from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.inplace.apply.record import record_for
from colrow.inplace.weights.save import assemble
from colrow.models.config import parameter_specs
from colrow.models.decoder import Decoder


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights on rank 0 of tp and pp, on the CPU; an empty dict on the other ranks.

    A tied head is not listed, as in transformers' saved files.

    Raises:
        ValueError: on all ranks of tp, naming parameters that every one of them should hold but
            that differ, or of which nothing says how they are divided.

    Communicates: the ranks of tp compare what is not divided, with a few numbers for each. Then
    every tp rank sends its shards to tp rank 0, parameter by parameter, and these send what they
    have to the first one of the pipeline; all ranks of the groups must call it. What FSDP2 divides
    is gathered over dp first.
    """
    return _assemble(model, lambda parameter: parameter.detach())


def full_grads(model: nn.Module) -> dict[str, Tensor]:
    """The whole gradients on rank 0 of tp and pp, as :func:`full_state_dict`.

    Parameters without a gradient are left out.
    """
    return _assemble(model, lambda parameter: parameter.grad, rounds=True)


@torch.no_grad()
def _assemble(
    model: nn.Module, value: Callable[[nn.Parameter], Tensor | None], *, rounds: bool = False
) -> dict[str, Tensor]:
    if (record := record_for(model)) is not None:
        return assemble(model, record, value, rounds=rounds)
    if not isinstance(model, Decoder):
        raise TypeError(
            f"{type(model).__name__} is neither colrow's decoder nor a model that "
            "colrow.parallelize has split"
        )
    naming, tp = hf_naming(model.config), model.tp
    named = dict(model.named_parameters())
    if added := [name for name in named if name not in model.specs]:
        raise ValueError(
            f"{', '.join(added[:3])} were added to the decoder, and a checkpoint in the form of "
            "transformers has no place for them: take them from model.named_parameters()"
        )
    shared = (Held(n, value(p), True) for n, p in named.items() if model.specs[n].dim is None)
    check_same(shared, tp, rounds=rounds)
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
    return _join_stages(whole, model)


def _join_stages(mine: dict[str, Tensor], model: Decoder) -> dict[str, Tensor]:
    """The tensors of all stages on the first rank of the pipeline; nothing elsewhere."""
    pp, split, config = model.pipeline.pp, model.pipeline.split, model.config
    if pp.size == 1 or model.tp.rank > 0:
        return mine
    naming, specs, like = hf_naming(config), parameter_specs(config, model.layout), _like(model)
    known = split.held(specs, 0, tied=config.tie_embeddings)
    for rank in range(1, pp.size):
        held = split.held(specs, rank, tied=config.tie_embeddings)
        shapes = {
            piece.name: piece.shape
            for name, spec in held.items()
            if name not in known  # a tied embedding is on both ends
            for piece in pieces(naming, config, name, spec, 0)
        }
        layer = f"stage of rank {rank}"
        if pp.rank == rank:
            there = torch.tensor([name in mine for name in shapes], device=like.device)
            primitives.send(there.to(torch.uint8), pp, 0, layer=layer)
            for name in shapes:
                if name in mine:
                    primitives.send(mine[name].to(like.device), pp, 0, layer=layer)
        elif pp.rank == 0:
            flags = torch.empty(len(shapes), dtype=torch.uint8, device=like.device)
            there = primitives.recv(flags, pp, rank, layer=layer)
            for (name, shape), found in zip(shapes.items(), there.tolist(), strict=True):
                if found:
                    buffer = primitives.recv(like.new_empty(shape), pp, rank, layer=layer)
                    mine[name] = buffer.cpu()
    return mine if pp.rank == 0 else {}


def _like(model: Decoder) -> Tensor:
    """A tensor of the parameters' dtype, where they are."""
    first = next(model.parameters()).detach()
    return first.to_local() if isinstance(first, DTensor) else first


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
