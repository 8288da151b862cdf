"""The proof of column- and row-parallel layers: the ranks' parts make up values and gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from colrow.inplace.find.layer_groups import LayerGroup
from colrow.inplace.find.local_sizes import LocalSizes, numbers_read
from colrow.inplace.find.proof import (
    NotProvenError,
    Proof,
    answered_runs,
    compare_values,
    keeps_divided,
    largest,
    near,
    put_together,
    rank_sizes,
    sum_of,
)
from colrow.inplace.find.simulate import GradientCuts, Simulation
from colrow.inplace.find.simulated_run import SimulatedRun, watched_gradients
from colrow.inplace.observe.reach import random_like
from colrow.inplace.observe.unit import Unit, UnitError
from colrow.inplace.observe.watch import AnswerStyle, ValueWatch


def prove_group(unit: Unit, group: LayerGroup, ranks: int) -> Proof:
    """Runs every rank's part of the group in this process and compares it with the whole.

    In eval and in training mode, with comparisons answered in every way.

    Raises:
        NotProvenError: when they differ, or cannot be run; the split may still be right then.
    """
    simulation = Simulation(unit, group)
    survey = ValueWatch()
    with numbers_read(unit.module, {*group.columns, *group.rows}) as numbers:
        whole = simulation.whole(watch=survey)
    answered = answered_runs(simulation, survey, ranks)
    found = rank_sizes(simulation, whole, numbers, ranks)
    _compare_answered(simulation, answered, found)
    try:
        proof = _gradients(simulation, whole, found, ranks, survey)
    except _MixedError as mixed:
        uncut = _downstream(unit, mixed.layers, group)
        simulation = Simulation(unit, group, GradientCuts(uncut, frozenset(mixed.layers)))
        try:
            proof = _gradients(simulation, simulation.whole(), found, ranks)
        except _MixedError as again:
            raise NotProvenError(str(again)) from None
    _prove_training(simulation, proof, ranks)
    proof.keeps = keeps_divided(simulation)
    return proof


def _compare_answered(
    simulation: Simulation,
    answered: list[tuple[AnswerStyle, SimulatedRun]],
    found: list[LocalSizes],
) -> None:
    """Each rank's part when comparisons are answered otherwise."""
    for style, whole in answered:
        for rank, local_sizes in enumerate(found):
            with torch.no_grad():
                part = simulation.rank(rank, local_sizes, whole, ValueWatch(style))
            compare_values(simulation.group, part, whole, rank)


def _prove_training(simulation: Simulation, proof: Proof, ranks: int) -> None:
    """The same once more as in training, where a module's forward may take other ways."""
    simulation.unit.training = True
    try:
        survey = ValueWatch()
        whole = simulation.whole(watch=survey)
        if missing := [name for name in proof.group.rows if not whole.inputs.get(name)]:
            raise NotProvenError(f"in training {missing[0]} is not called")
        answered = answered_runs(simulation, survey, ranks)
        _compare_answered(simulation, answered, proof.local_sizes)
        other = _gradients(simulation, whole, proof.local_sizes, ranks, survey)
    except UnitError as error:
        raise NotProvenError(f"does not run in training: {error}") from None
    except _MixedError as error:
        raise NotProvenError(f"in training {error}") from None
    finally:
        simulation.unit.training = False
    if other.shared != proof.shared:
        raise NotProvenError("in training other gradients are sums over the ranks")
    proof.partial_arguments |= other.partial_arguments


class _MixedError(Exception):
    """Some gradients are complete on one way and partial on another."""

    def __init__(self, message: str, layers: Iterable[str]) -> None:
        super().__init__(message)
        self.layers = frozenset(layers)


def _gradients(
    simulation: Simulation,
    whole: SimulatedRun,
    found: list[LocalSizes],
    ranks: int,
    survey: ValueWatch | None = None,
) -> Proof:
    group = simulation.group
    cotangents = random_like(whole.results, seed=3)
    parts = [simulation.rank(rank, found[rank], whole) for rank in range(ranks)]
    locals_: dict[int, int] = {}
    for rank, part in enumerate(parts):
        locals_ |= compare_values(group, part, whole, rank)
    # What of a local result a rank has is for the whole model's check; the rest counts here.
    for number in locals_:
        cotangents[number].zero_()
    if survey is None:
        expected = whole.gradients(cotangents)
    else:
        expected = watched_gradients(whole, survey, cotangents)
        if survey.problem:
            raise NotProvenError(survey.problem)
    got = []
    for part in parts:
        mine = [
            torch.zeros_like(y) if number in locals_ else c
            for number, (y, c) in enumerate(zip(part.results, cotangents, strict=True))
        ]
        got.append(part.gradients(mine))
    proof = Proof(group, simulation.cuts, found, local_results=locals_)
    scale = largest(expected.values())
    mixed: set[str] = set()
    message = ""
    connected: dict[Any, Tensor] | None = None
    for name, grad in expected.items():
        kind = name[0]
        if kind == "direct":
            layer = name[1].rpartition(".")[0]
            alike = all(name in g and near(g[name], grad, scale) for g in got)
            if layer in group.columns or layer in group.rows or not alike:
                raise NotProvenError(f"{name[1]} is used other than by its layer")
            continue
        mine = [g[name] for g in got]
        if kind in ("weight", "bias"):
            _check_layer(simulation, name, grad, mine, scale)
        elif kind == "cut":
            if not near(sum_of(mine), grad, scale):
                raise NotProvenError(f"the gradient into {name[1]} is not the sum over the ranks")
        elif kind == "parameter" and name[1] in group.parameters:
            dim, rows = group.parameters[name[1]]
            if not near(put_together(mine, dim, rows, grad), grad, scale):
                raise NotProvenError(f"the gradient of {name[1]} is not that of the whole")
        elif all(near(g, grad, scale) for g in mine):
            continue
        elif near(sum_of(mine), grad, scale):
            connected = connected or simulation.whole(connected=True).gradients(cotangents)
            if near(connected[name], grad, scale) or simulation.cuts.outputs:
                if kind == "parameter":
                    proof.shared.add(name[1])
                else:
                    proof.partial_arguments.add(name[1])
                continue
            message = f"the gradient of {_spoken(name)} reaches the split layers in two ways"
            mixed |= _layer_of(simulation, name)
            if not mixed:
                raise NotProvenError(message)
        else:
            raise NotProvenError(f"the gradient of {_spoken(name)} is not that of the whole")
    if mixed:
        raise _MixedError(message, mixed)
    return proof


def _spoken(name: Any) -> str:
    return name[1][0] if name[0] == "argument" else str(name[1])


def _layer_of(simulation: Simulation, name: Any) -> set[str]:
    if name[0] != "parameter":
        return set()
    path = name[1].rpartition(".")[0]
    return {path} & set(simulation.unit.linears)


def _downstream(unit: Unit, layers: frozenset[str], group: LayerGroup) -> frozenset[str]:
    """The column-parallel layers that these layers feed."""
    from colrow.inplace.observe.reach import probe

    reaches = probe(unit, set(group.columns))
    return frozenset(
        name
        for name, reach in reaches.items()
        if any(any(reach.outputs.get(layer, [])) for layer in layers)
    )


def _check_layer(
    simulation: Simulation, name: Any, grad: Tensor, mine: list[Tensor], scale: float
) -> None:
    group, (what, layer) = simulation.group, name
    if layer in group.columns:
        dim = 1 if what == "weight" and layer not in simulation.unit.factors else 0
        right = near(put_together(mine, dim, group.columns[layer], grad), grad, scale)
    elif what == "weight":
        right = near(put_together(mine, 1, group.rows[layer], grad), grad, scale)
    else:
        right = all(near(g, grad, scale) for g in mine)
    if not right:
        raise NotProvenError(f"the gradient of {layer}.{what} is not that of the whole")
