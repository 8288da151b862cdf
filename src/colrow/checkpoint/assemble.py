"""Whole tensors from the ranks' shards, of a decoder under the names of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.checkpoint.naming import hf_naming, pieces
from colrow.checkpoint.whole_tensors import WholeTensor, decoders_tensors
from colrow.comm import point_to_point
from colrow.comm.compat import local_tensor
from colrow.comm.group import ParallelGroup
from colrow.models.decoder import Decoder
from colrow.shards.boxes import Placement, divisions, tensor_parallel_group
from colrow.shards.model_shards import shards_for
from colrow.shards.same import HeldTensor, check_same, owner_of


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
    """A tensor for every parameter, under the names of the whole model.

    Args:
        rounds: the values may differ by rounding, as gradients.
    """
    decoder = model if isinstance(model, Decoder) else None
    if decoder is None and shards_for(model) is None:
        raise TypeError(
            f"{type(model).__name__} is neither colrow's decoder nor a model that "
            "colrow.parallelize has split"
        )
    named, divided = dict(model.named_parameters()), divisions(model)
    added = [] if decoder is None else [name for name in named if name not in decoder.specs]
    if added:
        raise ValueError(
            f"{', '.join(added[:3])} were added to the decoder, and a checkpoint in the form of "
            "transformers has no place for them: take them from model.named_parameters()"
        )
    tp = tensor_parallel_group(model)
    tensors = {} if decoder is None else decoders_tensors(decoder)
    held = (
        HeldTensor(name, value(named[name]), declared or decoder is not None, owner_of(model, name))
        for name, (spec, declared) in divided.items()
        if spec.dim is None
    )
    check_same(held, tp, rounds=rounds)
    whole: dict[str, Tensor] = {}
    for name, (spec, _) in divided.items():
        shard = value(named[name])
        if shard is None:
            continue
        if isinstance(shard, DTensor):  # FSDP2's rows of it, which come together over dp
            shard = shard.full_tensor()
        for rank in range(tp.size if spec.dim is not None else 1):
            local = _on_first(shard, rank, spec.local_shape(rank), tp, name)
            if local is None:
                continue
            for tensor in tensors.get(name) or (WholeTensor(name, spec.shape),):
                if tensor.name not in whole:
                    whole[tensor.name] = local.new_empty(tensor.shape)
                for part in tensor.parts(Placement(spec, rank), owned=False):
                    whole[tensor.name][part.whole] = part.view(local)
    return whole if decoder is None else _join_stages(whole, decoder)


def _on_first(
    shard: Tensor, rank: int, shape: tuple[int, ...], tp: ParallelGroup, name: str
) -> Tensor | None:
    """That rank's shard, of this shape, on rank 0's CPU; None elsewhere."""
    if tp.rank not in (0, rank):
        return None
    if tp.rank > 0:
        point_to_point.send(shard, tp, 0, layer=name)
        return None
    if rank > 0:
        shard = point_to_point.recv(shard.new_empty(shape), tp, rank, layer=name)
    return shard.cpu()


def _join_stages(mine: dict[str, Tensor], model: Decoder) -> dict[str, Tensor]:
    """The tensors of all stages on the first rank of the pipeline; nothing elsewhere."""
    pp, split, config = model.pipeline.pp, model.pipeline.split, model.config
    if pp.size == 1 or model.tp.rank > 0:
        return mine
    naming, specs, like = hf_naming(config), config.parameters(model.division), _like(model)
    known = split.held(specs, 0, tied=config.tie_embeddings)
    for rank in range(1, pp.size):
        held = split.held(specs, rank, tied=config.tie_embeddings)
        shapes = {
            piece.name: piece.shape
            for name, spec in held.items()
            if name not in known  # a tied embedding is on both ends
            for piece in pieces(naming, config, name, spec.shard, 0)
        }
        layer = f"stage of rank {rank}"
        if pp.rank == rank:
            there = torch.tensor([name in mine for name in shapes], device=like.device)
            point_to_point.send(there.to(torch.uint8), pp, 0, layer=layer)
            for name in shapes:
                if name in mine:
                    point_to_point.send(mine[name].to(like.device), pp, 0, layer=layer)
        elif pp.rank == 0:
            flags = torch.empty(len(shapes), dtype=torch.uint8, device=like.device)
            there = point_to_point.recv(flags, pp, rank, layer=layer)
            for (name, shape), found in zip(shapes.items(), there.tolist(), strict=True):
                if found:
                    buffer = point_to_point.recv(like.new_empty(shape), pp, rank, layer=layer)
                    mine[name] = buffer.cpu()
    return mine if pp.rank == 0 else {}


def _like(model: Decoder) -> Tensor:
    """A tensor of the parameters' dtype, where they are."""
    first = next(model.parameters()).detach()
    return local_tensor(first)
