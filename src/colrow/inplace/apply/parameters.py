"""Parameters stay the objects they were when they are split, for optimisers that hold them already.

Hooks on them, ties, and the groups of an optimiser stay too. What cannot stay is an error when the
optimiser steps.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from colrow.comm.compat import uncompiled
from colrow.partition import ShardSpec

_SPLIT, _REPLACED = "colrow_split", "colrow_replaced"


@torch.no_grad()
def keep_part(parameter: nn.Parameter, spec: ShardSpec, rank: int) -> Callable[[], None]:
    """Makes a whole parameter, and its gradient, this rank's part of it; returns what undoes it.

    An optimiser that has stepped before holds states of the whole shape: they are made parts in
    its next step, before anything is computed.
    """
    _watch_optimizers()
    whole, grad = parameter.data, parameter.grad
    parameter.grad = None
    _set_data(parameter, _part(whole, spec, rank))
    parameter.grad = None if grad is None else _part(grad, spec, rank)
    setattr(parameter, _SPLIT, (spec, rank))

    def undo() -> None:
        parameter.grad = None
        _set_data(parameter, whole)
        parameter.grad = grad
        parameter.__dict__.pop(_SPLIT, None)

    return undo


def note_replaced(parameter: nn.Parameter) -> Callable[[], None]:
    """Notes that a parameter is not the model's any more; returns what undoes it."""
    _watch_optimizers()
    setattr(parameter, _REPLACED, True)
    return partial(parameter.__dict__.pop, _REPLACED, None)


def _part(whole: Tensor, spec: ShardSpec, rank: int) -> Tensor:
    """A copy of what a rank holds of a tensor that is divided so."""
    dim = spec.dim
    assert dim is not None
    return torch.cat([whole.narrow(dim, a, b - a) for a, b in spec.global_ranges(rank)], dim)


def refuse_earlier_ddp(seen: weakref.WeakSet[DistributedDataParallel]) -> None:
    """Checks the DDP around the forward pass once, if there is one.

    Args:
        seen: those that are right; this one is added.

    Raises:
        ValueError: it was made when the parameters were whole, and would average nothing of those
            that are split since.
    """
    around = DistributedDataParallel._get_active_ddp_module()
    if around is None or around in seen:
        return
    trained = [p for p in around.module.parameters() if p.requires_grad]
    whole = {id(p): p.__dict__[_SPLIT][0].shape for p in trained if _SPLIT in p.__dict__}
    sizes = [math.prod(whole.get(id(p), p.shape)) * p.element_size() for p in trained]
    if whole and around._get_ddp_logging_data()["total_parameter_size_bytes"] == sum(sizes):
        raise ValueError(
            "DistributedDataParallel was wrapped around the model before colrow.parallelize split "
            "it: wrap it after"
        )
    seen.add(around)


def _set_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Gives a parameter data of another shape.

    Its node in the autograd graph remembers the shape and is alive while an earlier result is. A
    change of dtype on the way makes torch forget the node: to one of 16 bits, since references
    that compute in fp64 turn fp32 into it.
    """
    other = torch.bfloat16 if data.dtype != torch.bfloat16 else torch.float16
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data


@cache
def _watch_optimizers() -> None:
    """From now on optimisers check their parameters before a step, once for the process.

    torch has no other way to reach an optimiser that was made before.
    """
    register_optimizer_step_pre_hook(_before_step)


@uncompiled
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            known: dict[str, Any] = parameter.__dict__
            if _REPLACED in known:
                raise ValueError(
                    f"this {type(optimizer).__name__} holds parameters of a model on the meta "
                    "device, which were replaced when the model got its weights: make the "
                    "optimiser after colrow.parallelize and colrow.load_weights"
                )
            if _SPLIT in known and parameter in optimizer.state:
                _split_states(optimizer.state[parameter], *known[_SPLIT])


def _split_states(states: dict[str, Any], spec: ShardSpec, rank: int) -> None:
    """Makes states with the whole length of the divided dimension this rank's part of them."""
    dim = spec.dim
    assert dim is not None
    local = spec.local_shape(rank)[dim]
    for key, value in states.items():
        if (
            isinstance(value, Tensor)
            and value.dim() == len(spec.shape)
            and value.shape[dim] == spec.shape[dim] != local
        ):
            states[key] = _part(value, spec, rank)
