"""Modules that use their weights directly and add up: experts in stacked tensors.

Such a module has no inner layer at which the ranks' parts could be summed, so its result is. It
must be affine in one of its parameters, the last; the derivative with respect to that parameter
then shows what reaches it, as inputs do for a row-parallel layer. What the result has without that
parameter counts once: biases are divided by the number of ranks, or, where it comes from no
parameter (experts that hand tokens on), all ranks but the first subtract it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from colrow.inplace.atoms import connected, distribute, holders, members
from colrow.inplace.calls import Key, ModuleCall
from colrow.inplace.locals import Setting, settings, watching
from colrow.inplace.probe import patterns
from colrow.inplace.prove import NotProvenError, Proof, close, near, placed, sum_of
from colrow.inplace.search import Group
from colrow.inplace.simulate import Observed, Simulation, take
from colrow.inplace.unit import Unit, UnitError, linear_kind


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
    """The split of a module that uses the weights of several experts, or None.

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
                return _prove(unit, last, dim, group, ranks)
            except NotProvenError as error:
                reason = str(error)
    except UnitError as error:
        reason = f"could not be run alone: {error}"
    except RuntimeError as error:  # of an operation that has no second derivative
        reason = f"could not be looked at: {error}"
    reasons.update(dict.fromkeys(names, reason))
    return None


def _candidates(unit: Unit, names: list[str], ranks: int) -> list[tuple[str, int, Group]]:
    """Parameters that may be the last, the dimension summed over, and what goes with them."""
    whole = Simulation(unit, Group({}, {})).whole()
    leaves = {n: x for (kind, n), x in whole.leaves.items() if kind == "parameter"}
    generator = torch.Generator().manual_seed(5)
    total: Any = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
        for y in whole.results
    )
    found = []
    for last in names:
        others = {n: x for n, x in leaves.items() if n != last}
        (grad,) = torch.autograd.grad(
            total,
            [leaves[last]],
            create_graph=True,
            allow_unused=True,
        )
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
    ties += [sum(1 << i for i in range(j, width, period)) for j in range(period)]
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
    once, less = set[str](), ""
    if any(float(y.abs().max()) > 0 for y in nothing):
        names = [n for n, _ in unit.module.named_parameters(recurse=False)]
        once = {n for n in names if n not in group.parameters}
        less = "" if once or unit.linears else last
    parts = [_Part(simulation, rank, found[rank], once, less, ranks) for rank in range(ranks)]
    for number, y in enumerate(whole.results):
        if not close(sum_of([part.results[number] for part in parts]), y):
            raise NotProvenError("the parts do not add up to the whole")
    proof = _gradients(group, whole, parts, found, once)
    proof.less = less
    return proof


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


class _Part:
    """What a rank adds to the sum.

    Attributes:
        results: its part of each result.
    """

    def __init__(
        self,
        simulation: Simulation,
        rank: int,
        setting: Setting,
        once: set[str],
        less: str,
        ranks: int,
    ) -> None:
        module = simulation.unit.module
        scaled = {n: 1 / ranks for n in once}
        with _scaled(module, scaled):
            self._own = simulation.rank(rank, setting, Observed())
        self.results = [y.detach() for y in self._own.results]
        self._less, self._base = less, None
        if less and rank:
            with _scaled(module, {less: 0.0}):
                self._base = simulation.rank(rank, setting, Observed())
            pairs = zip(self.results, self._base.results, strict=True)
            self.results = [y - base.detach() for y, base in pairs]

    def gradients(self, cotangents: list[Tensor]) -> dict[Any, Tensor]:
        """As :meth:`Observed.gradients`."""
        grads = self._own.gradients(cotangents)
        if self._base is not None:
            for name, grad in self._base.gradients(cotangents).items():
                if name != ("parameter", self._less):
                    grads[name] = grads[name] - grad
        return grads


@contextmanager
def _scaled(module: nn.Module, factors: dict[str, float]) -> Iterator[None]:
    parameters = {n: module.get_parameter(n) for n in factors}
    whole = {n: p.detach().clone() for n, p in parameters.items()}
    try:
        for n, p in parameters.items():
            p.data.copy_(whole[n] * factors[n])
        yield
    finally:
        for n, p in parameters.items():
            p.data.copy_(whole[n])


def _gradients(
    group: Group, whole: Observed, parts: list[_Part], found: list[Setting], once: set[str]
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
