"""What is proven of a group of layers, and how the runs of ranks are compared with the whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from colrow.inplace.find.layer_groups import LayerGroup
from colrow.inplace.find.local_sizes import LocalSizes, ReadNumber, candidate_sizes
from colrow.inplace.find.shard_groups import take
from colrow.inplace.find.simulate import GradientCuts, Simulation
from colrow.inplace.find.simulated_run import SimulatedRun
from colrow.inplace.observe.calls import Key
from colrow.inplace.observe.decisions import DecisionError, check_decisions, check_memory
from colrow.inplace.observe.linear_layers import output_features
from colrow.inplace.observe.unit import UnitError
from colrow.inplace.observe.watch import AnswerStyle, ValueWatch

_QUERY_GROUPS = frozenset({"num_key_value_groups"})
_LIMIT = 1e-9


class NotProvenError(Exception):
    """The ranks' parts do not make up the whole; the message says where."""


@dataclass
class Proof:
    """What a rank has to do so that a group of layers may be split.

    Attributes:
        group: who holds what.
        cuts: where gradients are summed over the ranks.
        local_sizes: numbers that the module's forward must be given, by rank.
        shared: parameters that every rank holds whole and of whose gradient it sees a part.
        partial_arguments: tensors given to the module of whose gradient a rank sees a part.
        local_results: results of which a rank has a part, by number, and the dimension.
        summed: whether the module's results are to be summed over the ranks.
        counted_once: parameters of ``shared`` that every rank adds: they count 1/ranks on each.
        base_without: the parameter without which all ranks but the first compute their result
            once more, to subtract it; "" where there is nothing to subtract.
        keeps: whether the module keeps divided values, where other code may find them.
    """

    group: LayerGroup
    cuts: GradientCuts = field(default_factory=GradientCuts)
    local_sizes: list[LocalSizes] = field(default_factory=list)
    shared: set[str] = field(default_factory=set)
    partial_arguments: set[Key] = field(default_factory=set)
    local_results: dict[int, int] = field(default_factory=dict)
    summed: bool = False
    counted_once: set[str] = field(default_factory=set)
    base_without: str = ""
    keeps: bool = False


def keeps_divided(simulation: Simulation) -> bool:
    """Whether the module keeps values that the group divides, for others to use.

    Raises:
        NotProvenError: when a forward uses what an earlier one kept of divided values.
    """
    try:
        return check_memory(simulation.unit, lambda watch: simulation.whole(watch=watch))
    except DecisionError as error:
        raise NotProvenError(str(error)) from None


def answered_runs(
    simulation: Simulation, survey: ValueWatch, ranks: int
) -> list[tuple[AnswerStyle, SimulatedRun]]:
    """The whole as it runs when comparisons are answered otherwise, by the way that they are.

    Raises:
        NotProvenError: when it decides by values of which a rank has a part.
    """
    group = simulation.group

    def run(watch: ValueWatch, base: SimulatedRun | None) -> SimulatedRun:
        return simulation.whole(watch=watch, sums=base)

    def differs(other: SimulatedRun, base: SimulatedRun, rank: int) -> str:
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


def rank_sizes(
    simulation: Simulation, whole: SimulatedRun, numbers: list[ReadNumber], ranks: int
) -> list[LocalSizes]:
    """For each rank the numbers with which its layers get their part of what the whole's get.

    Raises:
        NotProvenError: when there are none for some rank.
    """
    known: dict[frozenset[tuple[int, int]], LocalSizes] = {}
    found = []
    for rank in range(ranks):
        sizes = _sizes(simulation, rank)
        order: list[LocalSizes] = [known[sizes]] if sizes in known else []
        last = "its forward does not run on a part"
        for local_sizes in (*order, *candidate_sizes(numbers, set(sizes))):
            try:
                with torch.no_grad():
                    part = simulation.rank(rank, local_sizes, whole)
                compare_values(simulation.group, part, whole, rank)
            except (UnitError, NotProvenError) as error:
                last = str(error)
                continue
            needed = _needed(simulation, whole, rank, local_sizes)
            known[sizes] = needed | _query_groups(numbers, needed, sizes)
            found.append(known[sizes])
            break
        else:
            raise NotProvenError(f"no local sizes found with which it computes its part: {last}")
    return found


def _needed(
    simulation: Simulation, whole: SimulatedRun, rank: int, local_sizes: LocalSizes
) -> LocalSizes:
    """Without the numbers that make no difference.

    Such a number need not be one of those that a split makes smaller: it may be how far a window
    reaches, which only longer sequences than this one show.
    """
    for number in list(local_sizes):
        fewer = {other: value for other, value in local_sizes.items() if other is not number}
        try:
            with torch.no_grad():
                part = simulation.rank(rank, fewer, whole)
            compare_values(simulation.group, part, whole, rank)
        except (UnitError, NotProvenError):
            continue
        local_sizes = fewer
    return local_sizes


def _query_groups(
    numbers: list[ReadNumber], local_sizes: LocalSizes, sizes: frozenset[tuple[int, int]]
) -> LocalSizes:
    """How many query heads share a KV head, where only batches with a mask ask for it.

    transformers' attention leaves the sharing to torch where there is no mask.
    """
    found: LocalSizes = {}
    for number in numbers:
        if number.name not in _QUERY_GROUPS or number in local_sizes:
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


def compare_values(
    group: LayerGroup, part: SimulatedRun, whole: SimulatedRun, rank: int
) -> dict[int, int]:
    """Compares what a rank's layers get, and what its module gives, with the whole.

    Returns:
        Results of which the rank has a part, by number, and the dimension that is smaller.

    Raises:
        NotProvenError: when anything differs otherwise.
    """
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


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding in fp64."""
    if a.shape != b.shape:
        return False
    a, b = a.detach().double(), b.detach().double()
    if not a.numel():
        return True
    if torch.equal(a, b):
        return True
    both = torch.isfinite(a) & torch.isfinite(b)
    if not torch.equal(a[~both], b[~both]) and not (a[~both].isnan() & b[~both].isnan()).all():
        return False
    a, b = a[both], b[both]
    scale = float(b.abs().max()) if b.numel() else 0.0
    return not a.numel() or float((a - b).abs().max()) <= _LIMIT * max(scale, 1e-3)


def near(a: Tensor, b: Tensor, scale: float) -> bool:
    """Equal but for rounding, relative to themselves or to a small part of ``scale``."""
    if a.shape != b.shape:
        return False
    if not a.numel():
        return True
    own = float(b.abs().max())
    return float((a - b).abs().max()) <= _LIMIT * max(own, 1e-4 * scale)


def largest(grads: Iterable[Tensor]) -> float:
    """The largest element of these gradients, as the ``scale`` of :func:`near`."""
    return max((float(g.abs().max()) for g in grads if g.numel()), default=1.0)


def sum_of(tensors: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def put_together(mine: list[Tensor], dim: int, rows: list[list[int]], like: Tensor) -> Tensor:
    """A tensor like the whole, to which every rank's part is added at its indices of ``dim``."""
    total = torch.zeros_like(like)
    for part, indices in zip(mine, rows, strict=True):
        total.index_add_(dim, torch.tensor(indices, dtype=torch.long), part)
    return total
