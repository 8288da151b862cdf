"""A split is kept only if every rank's part, put together, is the whole: values and gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from colrow.inplace.calls import Key
from colrow.inplace.decisions import DecisionError, check_decisions, check_memory
from colrow.inplace.equal import close, near, placed, sum_of
from colrow.inplace.locals import Number, Setting, settings, watching
from colrow.inplace.search import Group
from colrow.inplace.simulate import Cuts, Observed, Simulation, take, watched_gradients
from colrow.inplace.unit import Unit, UnitError, output_features
from colrow.inplace.watch import Style, Watch

_QUERY_GROUPS = frozenset({"num_key_value_groups"})


class NotProvenError(Exception):
    """The parts do not make up the whole; the message says where."""


@dataclass
class Proof:
    """What a rank has to do so that a group of layers may be split.

    Attributes:
        group: who holds what.
        cuts: where gradients are added up.
        settings: each rank's numbers.
        shared: parameters that every rank holds whole and of whose gradient it sees a part.
        partial_arguments: tensors given to the module of whose gradient a rank sees a part.
        local_results: results of which a rank has a part, by number, and the dimension.
        summed: whether the module's results are to be summed over the ranks.
        once: parameters of ``shared`` that every rank adds: they count 1/ranks on each.
        less: the parameter without which all ranks but the first compute their result once more,
            to subtract it; "" where there is nothing to subtract.
        keeps: whether the module keeps divided values, where other code may find them.
    """

    group: Group
    cuts: Cuts = field(default_factory=Cuts)
    settings: list[Setting] = field(default_factory=list)
    shared: set[str] = field(default_factory=set)
    partial_arguments: set[Key] = field(default_factory=set)
    local_results: dict[int, int] = field(default_factory=dict)
    summed: bool = False
    once: set[str] = field(default_factory=set)
    less: str = ""
    keeps: bool = False


def prove(unit: Unit, group: Group, ranks: int) -> Proof:
    """The proof for this group on that many ranks.

    Raises:
        NotProvenError: when there is none; nothing is known to be wrong then, or right.
    """
    simulation = Simulation(unit, group)
    survey = Watch()
    with watching(unit.module, {*group.columns, *group.rows}) as numbers:
        whole = simulation.whole(watch=survey)
    answered = undecided(simulation, survey, ranks)
    found = _settings(simulation, whole, numbers, ranks)
    _compare_answered(simulation, answered, found)
    try:
        proof = _gradients(simulation, whole, found, ranks, survey)
    except _MixedError as mixed:
        uncut = _downstream(unit, mixed.layers, group)
        simulation = Simulation(unit, group, Cuts(uncut, frozenset(mixed.layers)))
        try:
            proof = _gradients(simulation, simulation.whole(), found, ranks)
        except _MixedError as again:
            raise NotProvenError(str(again)) from None
    _prove_training(simulation, proof, ranks)
    proof.keeps = keeps_divided(simulation)
    return proof


def keeps_divided(simulation: Simulation) -> bool:
    """As :func:`check_memory`, for a group of layers.

    Raises:
        NotProvenError: when a forward uses what an earlier one kept of divided values.
    """
    try:
        return check_memory(simulation.unit, lambda watch: simulation.whole(watch=watch))
    except DecisionError as error:
        raise NotProvenError(str(error)) from None


def undecided(simulation: Simulation, survey: Watch, ranks: int) -> list[tuple[Style, Observed]]:
    """As :func:`check_decisions`, for a group of layers.

    Raises:
        NotProvenError: when it decides by what a rank has a part of.
    """
    group = simulation.group

    def run(watch: Watch, base: Observed | None) -> Observed:
        return simulation.whole(watch=watch, sums=base)

    def differs(other: Observed, base: Observed, rank: int) -> str:
        for name, rows in group.rows.items():
            pairs = zip(other.inputs.get(name, []), base.inputs.get(name, []), strict=True)
            for x, y in pairs:
                dim = y.dim() - 1
                if not close(take(x, dim, rows[rank]), take(y, dim, rows[rank])):
                    return f"a rank's input of {name}"
        if group.rows and base.results and not close(other.results[0], base.results[0]):
            return "its result"
        return ""

    try:
        return check_decisions(survey, ranks, run, differs)
    except DecisionError as error:
        raise NotProvenError(str(error)) from None


def _compare_answered(
    simulation: Simulation, answered: list[tuple[Style, Observed]], found: list[Setting]
) -> None:
    """Each rank's part when comparisons are answered otherwise."""
    for style, whole in answered:
        for rank, setting in enumerate(found):
            with torch.no_grad():
                part = simulation.rank(rank, setting, whole, Watch(style))
            _compare_values(simulation.group, part, whole, rank)


def _prove_training(simulation: Simulation, proof: Proof, ranks: int) -> None:
    """The same once more as in training, where a module's forward may take other ways."""
    simulation.unit.training = True
    try:
        survey = Watch()
        whole = simulation.whole(watch=survey)
        if missing := [name for name in proof.group.rows if not whole.inputs.get(name)]:
            raise NotProvenError(f"in training {missing[0]} is not called")
        answered = undecided(simulation, survey, ranks)
        _compare_answered(simulation, answered, proof.settings)
        other = _gradients(simulation, whole, proof.settings, ranks, survey)
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


def _settings(
    simulation: Simulation, whole: Observed, numbers: list[Number], ranks: int
) -> list[Setting]:
    """For each rank numbers with which its layers get their part of what the whole's get."""
    known: dict[frozenset[tuple[int, int]], Setting] = {}
    found = []
    for rank in range(ranks):
        sizes = _sizes(simulation, rank)
        order: list[Setting] = [known[sizes]] if sizes in known else []
        last = "its forward does not run on a part"
        for setting in (*order, *settings(numbers, set(sizes))):
            try:
                with torch.no_grad():
                    part = simulation.rank(rank, setting, whole)
                _compare_values(simulation.group, part, whole, rank)
            except (UnitError, NotProvenError) as error:
                last = str(error)
                continue
            needed = _needed(simulation, whole, rank, setting)
            known[sizes] = needed | _query_groups(numbers, needed, sizes)
            found.append(known[sizes])
            break
        else:
            raise NotProvenError(f"no local sizes found with which it computes its part: {last}")
    return found


def _needed(simulation: Simulation, whole: Observed, rank: int, setting: Setting) -> Setting:
    """Without the numbers that make no difference.

    Such a number need not be one of those that a split makes smaller: it may be how far a window
    reaches, which only longer sequences than this one show.
    """
    for number in list(setting):
        fewer = {other: value for other, value in setting.items() if other is not number}
        try:
            with torch.no_grad():
                part = simulation.rank(rank, fewer, whole)
            _compare_values(simulation.group, part, whole, rank)
        except (UnitError, NotProvenError):
            continue
        setting = fewer
    return setting


def _query_groups(
    numbers: list[Number], setting: Setting, sizes: frozenset[tuple[int, int]]
) -> Setting:
    """How many query heads share a KV head, where only batches with a mask ask for it.

    transformers' attention leaves the sharing to torch where there is no mask.
    """
    found: Setting = {}
    for number in numbers:
        if number.name not in _QUERY_GROUPS or number in setting:
            continue
        local = {
            queries // keys
            for queries, all_queries in sizes
            for keys, all_keys in sizes
            if all_queries == number.value * all_keys and queries % keys == 0
        }
        if len(local) == 1 and local != {number.value}:
            found[number] = local.pop()
    return found


def _sizes(simulation: Simulation, rank: int) -> frozenset[tuple[int, int]]:
    group, unit = simulation.group, simulation.unit
    sizes = {
        (len(rows[rank]), output_features(unit.linears[name]))
        for name, rows in group.columns.items()
    }
    sizes |= {
        (len(rows[rank]), unit.factors[name].down.shape[1]) for name, rows in group.rows.items()
    }
    for name, (dim, rows) in group.parameters.items():
        sizes.add((len(rows[rank]), unit.module.get_parameter(name).shape[dim]))
    return frozenset(sizes)


def _compare_values(group: Group, part: Observed, whole: Observed, rank: int) -> dict[int, int]:
    for name, inputs in whole.inputs.items():
        for x, y in zip(part.inputs.get(name, []), inputs, strict=True):
            if not close(x, take(y, y.dim() - 1, group.rows[name][rank])):
                raise NotProvenError(f"{name} does not get its part of the input")
    if len(part.results) != len(whole.results):
        raise NotProvenError("it gives another number of results")
    partial: dict[int, int] = {}
    for number, (mine, all_) in enumerate(zip(part.results, whole.results, strict=True)):
        if close(mine, all_):
            continue
        dim = _local_dim(mine, all_)
        if dim is None or number == 0:
            raise NotProvenError(f"result {number} differs")
        partial[number] = dim
    return partial


def _local_dim(mine: Tensor, whole: Tensor) -> int | None:
    """The one dimension in which a rank's result is smaller."""
    if mine.dim() != whole.dim():
        return None
    dims = [d for d in range(mine.dim()) if mine.shape[d] != whole.shape[d]]
    return dims[0] if len(dims) == 1 else None


def _gradients(
    simulation: Simulation,
    whole: Observed,
    found: list[Setting],
    ranks: int,
    survey: Watch | None = None,
) -> Proof:
    group = simulation.group
    generator = torch.Generator().manual_seed(3)
    cotangents = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in whole.results
    ]
    parts = [simulation.rank(rank, found[rank], whole) for rank in range(ranks)]
    locals_: dict[int, int] = {}
    for rank, part in enumerate(parts):
        locals_ |= _compare_values(group, part, whole, rank)
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
    scale = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=1.0)
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
            if not near(placed(mine, dim, rows, grad), grad, scale):
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


def _downstream(unit: Unit, layers: frozenset[str], group: Group) -> frozenset[str]:
    """The column-parallel layers that these layers feed."""
    from colrow.inplace.probe import probe

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
        right = near(placed(mine, dim, group.columns[layer], grad), grad, scale)
    elif what == "weight":
        right = near(placed(mine, 1, group.rows[layer], grad), grad, scale)
    else:
        right = all(near(g, grad, scale) for g in mine)
    if not right:
        raise NotProvenError(f"the gradient of {layer}.{what} is not that of the whole")
