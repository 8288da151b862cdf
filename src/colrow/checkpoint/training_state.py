"""What of a model and its optimisers is in a training checkpoint, and which part a rank has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from colrow.checkpoint.training_plan import StoredShard
from colrow.comm.compat import local_tensor
from colrow.partition import ShardSpec
from colrow.shards.boxes import Placement, buffer_placements, placements, unwrap
from colrow.shards.optimizers import check_optimizer, whole_states
from colrow.shards.same import HeldTensor, owner_of

Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def listed(optimizers: Optimizers | None) -> list[torch.optim.Optimizer]:
    """One optimiser, several or none, as a list."""
    if optimizers is None:
        return []
    return [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)


def collect(
    module: nn.Module, optimizers: Optimizers | None, *, copy: bool
) -> tuple[dict[str, StoredShard], dict[str, dict[str, float]]]:
    """What is divided, by name, and the optimiser's numbers.

    With ``copy``, the boxes that this rank owns, copied to the CPU; without, views of all boxes.
    """
    shards: dict[str, StoredShard] = {}
    scalars: dict[str, dict[str, float]] = {}
    places, several = placements(unwrap(module)), listed(optimizers)
    for optimizer in several:
        check_optimizer(optimizer, module)
    for name, parameter in unwrap(module).named_parameters():
        shards[f"model.{name}"] = _shard(parameter, places[name], copy)
        for optimizer in several:
            whole = whole_states(optimizer)
            for key, value in optimizer.state.get(parameter, {}).items():
                tensor = isinstance(value, Tensor) and value.dim() > 0
                if key in whole:
                    place = Placement(ShardSpec.replicated(*value.shape), places[name].tp_rank)
                    shards[f"optimizer.{name}.{key}"] = _shard(value, place, copy)
                elif tensor and value.shape == parameter.shape:
                    shards[f"optimizer.{name}.{key}"] = _shard(value, places[name], copy)
                else:
                    scalars.setdefault(name, {})[key] = _number(value, name, key, optimizer)
    buffers = dict(unwrap(module).named_buffers())
    for name, place in buffer_placements(unwrap(module)).items():
        shards[f"buffer.{name}"] = _shard(buffers[name], place, copy)
    return shards, scalars


def _number(value: Any, name: str, key: str, optimizer: torch.optim.Optimizer) -> float:
    """A state that is one number.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ValueError(
        f"the state {key!r} that {type(optimizer).__name__} keeps for {name} is {what:.80}: a "
        "checkpoint stores numbers and tensors of the parameter's shape, which can be divided "
        "anew. Use torch.optim.AdamW or another elementwise optimiser, colrow.Muon or "
        "colrow.Adafactor, or store this one's state yourself"
    )


def held_by_all(module: nn.Module, optimizers: Optimizers) -> list[HeldTensor]:
    """What counts as the same on every tp rank."""
    module, found = unwrap(module), list[HeldTensor]()
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    places = {**placements(module), **buffer_placements(module)}
    for name, place in places.items():
        if place.spec.dim is not None:
            continue
        tensor, owner = named[name], owner_of(module, name)
        found.append(HeldTensor(name, local_tensor(tensor), place.declared, owner))
        for optimizer in listed(optimizers):
            for key, value in optimizer.state.get(tensor, {}).items():
                if isinstance(value, Tensor) and value.shape == tensor.shape:
                    state = local_tensor(value)
                    found.append(HeldTensor(f"{key} of {name}", state, place.declared, owner))
    return found


def _shard(tensor: Tensor, place: Placement, copy: bool) -> StoredShard:
    local = local_tensor(tensor.detach())
    pairs = [(box, box.view(local)) for box in (place.owned if copy else place.boxes)]
    if copy:
        pairs = [(box, part.to("cpu", copy=True).contiguous()) for box, part in pairs]
    return StoredShard(place.spec.shape, tensor.dtype, tuple(pairs))


def make_states(index: dict[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimiser, which makes its states in its first step, those that were stored."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    stored: dict[str, Any] = index["tensors"]
    on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
    for name, parameter in unwrap(module).named_parameters():
        prefix = f"optimizer.{name}."
        if id(parameter) not in trained:
            continue
        state: dict[str, Any] = {}
        for key, value in index["state"]["optimizer"].get(name, {}).items():
            device = parameter.device if on_device else "cpu"
            state[key] = torch.tensor(value, dtype=torch.float32, device=device)
        for full, found in stored.items():
            key = full.removeprefix(prefix)
            if key != full and "." not in key:
                dtype = getattr(torch, found["dtype"])
                if key in whole_states(optimizer):
                    local = local_tensor(parameter.detach())
                    state[key] = local.new_zeros(found["shape"], dtype=dtype)
                else:
                    state[key] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        if state:
            optimizer.state[parameter] = state
