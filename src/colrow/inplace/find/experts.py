"""Modules that use their weights directly and add up: experts in stacked tensors.

Such a module has no inner layer at which the ranks' parts could be summed, so its result is. It
must be affine in one of its parameters, the last; the derivative with respect to that parameter
then shows what reaches it, as inputs do for a row-parallel layer. What the result has without that
parameter counts once: biases are divided by the number of ranks, or, where it comes from no
parameter (experts that hand tokens on), all ranks but the first subtract it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from colrow.inplace.find.experts_proof import prove_experts
from colrow.inplace.find.layer_groups import LayerGroup
from colrow.inplace.find.proof import NotProvenError, Proof
from colrow.inplace.find.shard_groups import connected, distribute, holders, members
from colrow.inplace.find.simulate import Simulation
from colrow.inplace.observe.calls import ModuleCall
from colrow.inplace.observe.linear_layers import linear_kind
from colrow.inplace.observe.reach import patterns, random_like
from colrow.inplace.observe.unit import Unit, UnitError


def used_directly(module: nn.Module) -> list[str]:
    """Names of parameters of two or three dimensions that no inner layer multiplies with."""
    layers = {n for n, m in module.named_modules() if linear_kind(m) or isinstance(m, _NO_EXPERTS)}
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.dim() in (2, 3) and name.rpartition(".")[0] not in layers
    ]


def _stacked(module: nn.Module, free: set[str]) -> list[str]:
    """Those that may be weights of several experts at once.

    Those with three dimensions, and three alike with two.
    """
    found: dict[Any, list[str]] = {}
    for name in sorted(free):
        shape = tuple(module.get_parameter(name).shape)
        found.setdefault("stacks" if len(shape) == 3 else shape, []).append(name)
    return [n for k, names in found.items() if len(names) > 1 + (k != "stacks") for n in names]


_NO_EXPERTS = (nn.Embedding, _ConvNd)


def find_experts(
    name: str,
    module: nn.Module,
    call: ModuleCall,
    free: set[str],
    ranks: int,
    reasons: dict[str, str],
) -> Proof | None:
    """The proof that a module which uses stacked weights of experts can be split, or None.

    Args:
        free: parameters that may be split, by name inside the module.
        reasons: gets the reason why not, under the parameters' names.
    """
    names = _stacked(module, free)
    if len(names) < 2:
        return None
    reason = "no way was found to split it inside each expert"
    try:
        unit = Unit.of(name, module, call)
        for last, dim, group in _candidates(unit, names, ranks):
            try:
                return prove_experts(unit, last, dim, group, ranks)
            except NotProvenError as error:
                reason = str(error)
    except UnitError as error:
        reason = f"could not be run alone: {error}"
    except RuntimeError as error:  # of an operation that has no second derivative
        reason = f"could not be looked at: {error}"
    reasons.update(dict.fromkeys(names, reason))
    return None


def _candidates(unit: Unit, names: list[str], ranks: int) -> list[tuple[str, int, LayerGroup]]:
    """Parameters that may be the last, the dimension summed over, and what goes with them."""
    whole = Simulation(unit, LayerGroup({}, {})).whole()
    leaves = {n: x for (kind, n), x in whole.leaves.items() if kind == "parameter"}
    pairs = zip(whole.results, random_like(whole.results, seed=5), strict=True)
    total: Any = sum((y * weight).sum() for y, weight in pairs)
    found = []
    for last in names:
        others = {n: x for n, x in leaves.items() if n != last}
        (grad,) = torch.autograd.grad(total, [leaves[last]], create_graph=True, allow_unused=True)
        if grad is None or not grad.requires_grad:
            continue
        flat = grad.dim() == 2  # all experts' features in one dimension
        for dim in range(0 if flat else 1, grad.dim()):
            reach = patterns([grad.movedim(dim, -1)], list(others.values()))
            by_name = dict(zip(others, reach, strict=True))
            width = grad.shape[dim]
            for period in _periods(unit, width) if flat and not dim else [width]:
                group = _group(last, dim, leaves, by_name, ranks, period)
                if group is not None:
                    found.append((last, dim, group))
    return sorted(found, key=lambda c: leaves[c[0]].shape[c[1]])


def _periods(unit: Unit, width: int) -> list[int]:
    """How many features one expert may have, of ``width`` that all have."""
    numbers = {n for m in unit.module.modules() for n in vars(m).values() if type(n) is int}
    return sorted(n for n in numbers if 1 < n < width and not width % n)


def _group(
    last: str,
    dim: int,
    leaves: dict[str, Tensor],
    reach: dict[str, dict[int, list[int]]],
    ranks: int,
    period: int,
) -> LayerGroup | None:
    width = leaves[last].shape[dim]
    everything = (1 << width) - 1
    split: dict[str, tuple[int, list[int]]] = {}
    for name, by_dim in reach.items():
        for other, masks in by_dim.items():
            sparse = [mask for mask in masks if mask and mask != everything]
            # The experts' own dimension reaches everything; so do input features.
            if other >= 0 and len(sparse) == len(masks) and len(masks) >= width:
                split[name] = (other, masks)
    ties = [mask for _, masks in split.values() for mask in masks]
    covered = 0
    for tie in ties:
        covered |= tie
    if not split or covered != everything:
        return None
    ties += [sum(1 << i for i in range(j, width, period)) for j in range(period)]
    shard_groups = connected(width, ties)
    if len(shard_groups) < ranks:
        return None
    shares = distribute(shard_groups, ranks)
    group = LayerGroup({}, {}, shard_groups=len(shard_groups))
    group.parameters[last] = (dim, [members(share) for share in shares])
    for name, (other, masks) in split.items():
        group.parameters[name] = (other, holders(masks, shares))
    return group
