"""A split of stacked experts is kept only if the ranks' parts add up: values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from colrow.inplace.find.layer_groups import LayerGroup
from colrow.inplace.find.local_sizes import LocalSizes, candidate_sizes, numbers_read
from colrow.inplace.find.proof import (
    NotProvenError,
    Proof,
    answered_runs,
    close,
    keeps_divided,
    largest,
    near,
    put_together,
    sum_of,
)
from colrow.inplace.find.shard_groups import take
from colrow.inplace.find.simulate import Simulation
from colrow.inplace.find.simulated_run import SimulatedRun
from colrow.inplace.observe.calls import Key
from colrow.inplace.observe.reach import random_like
from colrow.inplace.observe.unit import Unit, UnitError
from colrow.inplace.observe.watch import ValueWatch


def prove_experts(unit: Unit, last: str, dim: int, group: LayerGroup, ranks: int) -> Proof:
    """The proof for this group on that many ranks.

    Args:
        last: the parameter in which the module is affine.
        dim: its dimension that is summed over, and split.

    Raises:
        NotProvenError: when there is none.
    """
    alone = Simulation(unit, LayerGroup({}, {}))
    with numbers_read(unit.module, set()) as numbers:
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
    answered = []
    try:
        for unit.training in (True, False):
            survey = ValueWatch()
            with torch.no_grad():
                simulation.whole(watch=survey)
            answered = [style for style, _ in answered_runs(simulation, survey, ranks)]
    finally:
        unit.training = False
    found: list[LocalSizes] = []
    try:
        nothing = _results(alone, weight, kept * 0)
        for rank in range(ranks):
            masked = torch.zeros_like(kept)
            index = torch.tensor(rows[rank])
            masked.index_copy_(dim, index, take(kept, dim, rows[rank]))
            expected = _results(alone, weight, masked)
            otherwise = [
                (style, simulation.whole(watch=ValueWatch(style)).results) for style in answered
            ]
            weight.data.copy_(kept)
            found.append(
                _setting(simulation, rank, expected, candidate_sizes(numbers, sizes[rank]))
            )
            for style, results in otherwise:
                part = simulation.rank(rank, found[rank], SimulatedRun(), ValueWatch(style))
                if not all(close(a, b) for a, b in zip(part.results, results, strict=True)):
                    raise NotProvenError("a rank's part differs where values are compared")
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
    proof.base_without = less
    proof.keeps = keeps_divided(simulation)
    return proof


def _results(simulation: Simulation, weight: nn.Parameter, value: Tensor) -> list[Tensor]:
    weight.data.copy_(value)
    return [y.detach() for y in simulation.whole().results]


def _setting(simulation: Simulation, rank: int, expected: list[Tensor], tries: Any) -> LocalSizes:
    last = "its forward does not run on a part"
    for local_sizes in tries:
        try:
            got = simulation.rank(rank, local_sizes, SimulatedRun()).results
        except UnitError as error:
            last = str(error)
            continue
        if all(close(a, b) for a, b in zip(got, expected, strict=True)):
            chosen: LocalSizes = local_sizes
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
        local_sizes: LocalSizes,
        once: set[str],
        less: str,
        ranks: int,
    ) -> None:
        module = simulation.unit.module
        scaled = {n: 1 / ranks for n in once}
        with _scaled(module, scaled):
            self._own = simulation.rank(rank, local_sizes, SimulatedRun())
        self.results = [y.detach() for y in self._own.results]
        self._less, self._base = less, None
        if less and rank:
            with _scaled(module, {less: 0.0}):
                self._base = simulation.rank(rank, local_sizes, SimulatedRun())
            pairs = zip(self.results, self._base.results, strict=True)
            self.results = [y - base.detach() for y, base in pairs]

    def gradients(self, cotangents: list[Tensor]) -> dict[Any, Tensor]:
        """As :meth:`SimulatedRun.gradients`."""
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
    group: LayerGroup,
    whole: SimulatedRun,
    parts: list[_Part],
    found: list[LocalSizes],
    once: set[str],
) -> Proof:
    cotangents = random_like(whole.results, seed=3)
    expected = whole.gradients(cotangents)
    got = [part.gradients(cotangents) for part in parts]
    scale = largest(expected.values())
    shared: set[str] = set()
    partial: set[Key] = set()
    for name, grad in expected.items():
        kind, key = name
        if kind == "direct":
            raise NotProvenError(f"{key} is used other than by its layer")
        mine = [g[name] for g in got]
        if kind == "parameter" and key in group.parameters:
            dim, rows = group.parameters[key]
            right = near(put_together(mine, dim, rows, grad), grad, scale)
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
        local_sizes=found,
        shared=shared,
        partial_arguments=partial,
        summed=True,
        counted_once=once,
    )
