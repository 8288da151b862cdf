"""Modules that use their weights directly and add up: experts in three-dimensional tensors.

Such a module has no inner layer at which the ranks' parts could be summed, so its result is. It
must be linear in one of its parameters, the last; the derivative with respect to that parameter
then shows what reaches it, as inputs do for a row-parallel layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from colrow.inplace.atoms import connected, distribute, holders, members
from colrow.inplace.calls import Key, ModuleCall
from colrow.inplace.locals import Setting, settings, watching
from colrow.inplace.probe import patterns
from colrow.inplace.prove import NotProvenError, Proof, close, near, placed, sum_of
from colrow.inplace.search import Group
from colrow.inplace.simulate import Observed, Simulation, take
from colrow.inplace.unit import Unit, UnitError


def find_experts(
    name: str, module: nn.Module, call: ModuleCall, ranks: int, reasons: dict[str, str]
) -> Proof | None:
    """The split of a module that owns the weights of several experts, or None.

    A reason goes to ``reasons`` under the parameters' names.
    """
    stacked = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3]
    if len(stacked) < 2:
        return None
    reason = "no way was found to split it inside each expert"
    try:
        unit = Unit.of(name, module, call)
        for last, dim, group in _candidates(unit, stacked, ranks):
            try:
                return _prove(unit, last, dim, group, ranks)
            except NotProvenError as error:
                reason = str(error)
    except UnitError as error:
        reason = f"could not be run alone: {error}"
    reasons.update(dict.fromkeys(stacked, reason))
    return None


def _candidates(unit: Unit, stacked: list[str], ranks: int) -> list[tuple[str, int, Group]]:
    """Parameters that may be the last, the dimension summed over, and what goes with them."""
    whole = Simulation(unit, Group({}, {})).whole()
    leaves = {n: x for (kind, n), x in whole.leaves.items() if kind == "parameter"}
    generator = torch.Generator().manual_seed(5)
    total: Any = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
        for y in whole.results
    )
    found = []
    for last in stacked:
        others = {n: x for n, x in leaves.items() if n != last}
        (grad,) = torch.autograd.grad(
            total,
            [leaves[last]],
            create_graph=True,
            allow_unused=True,
        )
        if grad is None or not grad.requires_grad:
            continue
        for dim in range(1, grad.dim()):
            reach = patterns([grad.movedim(dim, -1)], list(others.values()))
            by_name = dict(zip(others, reach, strict=True))
            group = _group(last, dim, leaves, by_name, ranks)
            if group is not None:
                found.append((last, dim, group))
    return sorted(found, key=lambda c: leaves[c[0]].shape[c[1]])


def _group(
    last: str,
    dim: int,
    leaves: dict[str, Tensor],
    reach: dict[str, dict[int, list[int]]],
    ranks: int,
) -> Group | None:
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
    atoms = connected(width, ties)
    if len(atoms) < ranks:
        return None
    shares = distribute(atoms, ranks)
    group = Group({}, {}, atoms=len(atoms))
    group.parameters[last] = (dim, [members(share) for share in shares])
    for name, (other, masks) in split.items():
        group.parameters[name] = (other, holders(masks, shares))
    return group


def _prove(unit: Unit, last: str, dim: int, group: Group, ranks: int) -> Proof:
    alone = Simulation(unit, Group({}, {}))
    with watching(unit.module, set()) as numbers:
        whole = alone.whole()
    rows = group.parameters[last][1]
    weight = unit.module.get_parameter(last)
    kept = weight.detach().clone()
    sizes = [
        {
            (len(r[rank]), unit.module.get_parameter(n).shape[d])
            for n, (d, r) in group.parameters.items()
        }
        for rank in range(ranks)
    ]
    simulation = Simulation(unit, group)
    found: list[Setting] = []
    try:
        nothing = _results(alone, weight, kept * 0)
        for rank in range(ranks):
            masked = torch.zeros_like(kept)
            index = torch.tensor(rows[rank])
            masked.index_copy_(dim, index, take(kept, dim, rows[rank]))
            expected = _results(alone, weight, masked)
            weight.data.copy_(kept)
            found.append(_setting(simulation, rank, expected, settings(numbers, sizes[rank])))
    finally:
        weight.data.copy_(kept)
    once = set()
    if any(float(y.abs().max()) > 0 for y in nothing):
        names = [n for n, _ in unit.module.named_parameters(recurse=False)]
        once = {n for n in names if n not in group.parameters}
    parts = [_part(simulation, rank, found[rank], once, ranks) for rank in range(ranks)]
    for number, y in enumerate(whole.results):
        if not close(sum_of([part.results[number].detach() for part in parts]), y):
            raise NotProvenError("the parts do not add up to the whole")
    return _gradients(group, whole, parts, found, once)


def _results(simulation: Simulation, weight: nn.Parameter, value: Tensor) -> list[Tensor]:
    weight.data.copy_(value)
    return [y.detach() for y in simulation.whole().results]


def _setting(simulation: Simulation, rank: int, expected: list[Tensor], tries: Any) -> Setting:
    last = "its forward does not run on a part"
    for setting in tries:
        try:
            got = simulation.rank(rank, setting, Observed()).results
        except UnitError as error:
            last = str(error)
            continue
        if all(close(a, b) for a, b in zip(got, expected, strict=True)):
            chosen: Setting = setting
            return chosen
    raise NotProvenError(f"no local sizes found with which it computes its part: {last}")


def _part(
    simulation: Simulation, rank: int, setting: Setting, once: set[str], ranks: int
) -> Observed:
    parameters = {n: simulation.unit.module.get_parameter(n) for n in once}
    whole = {n: p.detach().clone() for n, p in parameters.items()}
    try:
        for n, p in parameters.items():
            p.data.copy_(whole[n] / ranks)
        return simulation.rank(rank, setting, Observed())
    finally:
        for n, p in parameters.items():
            p.data.copy_(whole[n])


def _gradients(
    group: Group, whole: Observed, parts: list[Observed], found: list[Setting], once: set[str]
) -> Proof:
    generator = torch.Generator().manual_seed(3)
    cotangents = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in whole.results
    ]
    expected = whole.gradients(cotangents)
    got = [part.gradients(cotangents) for part in parts]
    scale = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=1.0)
    shared: set[str] = set()
    partial: set[Key] = set()
    for name, grad in expected.items():
        kind, key = name
        if kind == "direct":
            raise NotProvenError(f"{key} is used other than by its layer")
        mine = [g[name] for g in got]
        if kind == "parameter" and key in group.parameters:
            dim, rows = group.parameters[key]
            right = near(placed(mine, dim, rows, grad), grad, scale)
        else:
            factor = len(parts) if kind == "parameter" and key in once else 1
            right = near(sum_of(mine) / factor, grad, scale)
            if kind == "parameter":
                shared.add(key)
            else:
                partial.add(key)
        if not right:
            raise NotProvenError(f"the gradient of {key} is not that of the whole")
    return Proof(
        group,
        settings=found,
        shared=shared,
        partial_arguments=partial,
        summed=True,
        once=once,
    )
