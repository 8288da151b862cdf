"""One rank's part of a module, run in this process, with what the other ranks would send.

The sum over ranks at a row-parallel layer has the value that the whole module had there, and the
derivative that an all-reduce with identity backward has. Where an all-reduce of gradients belongs,
the graph is cut and the ranks' parts are collected, to be added up by whoever compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from colrow.inplace.find.layer_groups import IndicesByRank, LayerGroup
from colrow.inplace.find.local_sizes import LocalSizes, with_sizes
from colrow.inplace.find.shard_groups import take, take_periodic
from colrow.inplace.find.simulated_run import SimulatedRun
from colrow.inplace.observe.calls import Key, tensors_of
from colrow.inplace.observe.unit import Unit
from colrow.inplace.observe.watch import ValueWatch


@dataclass(frozen=True)
class GradientCuts:
    """Where the gradients of all ranks are added up, other than at every column-parallel input.

    Attributes:
        uncut: column-parallel layers at whose input they are not.
        outputs: whole layers at whose output they are instead.
    """

    uncut: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()


class Simulation:
    """Runs one module in this process: the whole, or the part of a rank."""

    def __init__(self, unit: Unit, group: LayerGroup, cuts: GradientCuts | None = None) -> None:
        self.unit, self.group, self.cuts = unit, group, cuts or GradientCuts()

    def whole(
        self,
        *,
        connected: bool = False,
        watch: ValueWatch | None = None,
        sums: SimulatedRun | None = None,
    ) -> SimulatedRun:
        """The unsplit module.

        Args:
            connected: leaves the graph uncut.
            watch: follows what the group divides.
            sums: the run whose sums row-parallel layers give; their own by default.
        """
        return self._run(None, {}, sums, watch, connected=connected)

    def rank(
        self,
        rank: int,
        local_sizes: LocalSizes,
        whole: SimulatedRun,
        watch: ValueWatch | None = None,
    ) -> SimulatedRun:
        """The part of one rank."""
        return self._run(rank, local_sizes, whole, watch)

    def _run(
        self,
        rank: int | None,
        local_sizes: LocalSizes,
        sums: SimulatedRun | None,
        watch: ValueWatch | None,
        *,
        connected: bool = False,
    ) -> SimulatedRun:
        seen = SimulatedRun()
        forwards = {
            name: self._column(name, rank, seen, cut=not connected and name not in self.cuts.uncut)
            for name in self.group.columns
        }
        forwards |= {name: self._row(name, rank, seen, sums) for name in self.group.rows}
        if not connected:
            forwards |= {name: self._output(name, seen) for name in self.cuts.outputs}

        def leaf(key: Key, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            floating = value.is_floating_point()
            if floating:
                value = seen.leaf(value, "argument", key)
            if rank is not None and key in self.group.arguments:
                dim, period, rows = self.group.arguments[key]
                value = take_periodic(value, dim, period, rows[rank])
            if watch is not None and floating and key in self.group.arguments:
                value = _followed(watch, value, self.group.arguments[key], rank, scaled=True)
            # A module may write into what it is given, but not into a leaf.
            return value.clone() if floating else value

        others = self.unit.factors.keys() - self.group.columns.keys() - self.group.rows.keys()
        forwards = {name: self._plain(name, seen) for name in others} | forwards
        skip = {f"{name}." for name in (*self.unit.factors, *self.group.columns)}
        parameters, local_parameters = {}, {}
        for name, parameter in self.unit.module.named_parameters():
            if any(name.startswith(prefix) for prefix in skip):
                seen.leaves["direct", name] = parameter.detach().requires_grad_()
                continue
            parameters[name] = local = parameter.detach()
            if rank is not None and name in self.group.parameters:
                dim, rows = self.group.parameters[name]
                local = take(local, dim, rows[rank])
            local_parameters[name] = seen.leaf(local, "parameter", name)
        if watch is not None:
            forwards = self._watched(watch, forwards, rank)
            for name, (dim, rows) in self.group.parameters.items():
                if name not in parameters:
                    continue
                place = dim, parameters[name].shape[dim], rows
                local = _followed(watch, local_parameters[name], place, rank, scaled=True)
                local_parameters[name] = local
        direct = {n: x for (kind, n, *_), x in seen.leaves.items() if kind == "direct"}
        local_parameters |= direct
        with with_sizes(self.unit.module, local_sizes):
            result = self.unit.run(leaf, forwards, watch, local_parameters)
        seen.results = tensors_of(result)
        if watch is not None:
            watch.end(pytree.tree_leaves(result), summed=not self.group.rows)
        return seen

    def _watched(
        self, watch: ValueWatch, forwards: dict[str, Any], rank: int | None
    ) -> dict[str, Any]:
        """The layers of the group, between which values are divided."""

        def column(forward: Any, rows: IndicesByRank) -> Any:
            def watched(x: Tensor, *_: Any) -> Tensor:
                with watch.elsewhere():
                    y: Tensor = forward(x)
                return _followed(watch, y, (-1, y.shape[-1], rows), rank, scaled=False)

            return watched

        def row(forward: Any) -> Any:
            def watched(x: Tensor, *_: Any) -> Any:
                with watch.elsewhere():
                    if x.requires_grad:
                        x = x.view_as(x)  # hooks of the model's own see what is marked here
                        x.register_hook(watch.mark)
                    return forward(x)

            return watched

        found = dict(forwards)
        for name, rows in self.group.columns.items():
            found[name] = column(forwards[name], rows)
        for name in self.group.rows:
            found[name] = row(forwards[name])
        return found

    def _column(self, name: str, rank: int | None, seen: SimulatedRun, *, cut: bool) -> Any:
        if name not in self.unit.factors:
            return self._table(name, rank, seen)
        factors = self.unit.factors[name]
        up, bias = factors.up, factors.bias
        if rank is not None:
            up = take(up, 0, self.group.columns[name][rank])
            bias = None if bias is None else take(bias, 0, self.group.columns[name][rank])
        up = seen.leaf(up, "weight", name)
        if bias is not None:
            bias = seen.leaf(bias, "bias", name)
        calls = 0

        def forward(x: Tensor, *_: Any) -> Tensor:
            nonlocal calls
            if cut:
                x = x.detach().requires_grad_()
                seen.leaves["cut", name, calls] = x
            calls += 1
            return F.linear(F.linear(x, factors.down), up, bias)

        return forward

    def _plain(self, name: str, seen: SimulatedRun) -> Any:
        factors = self.unit.factors[name]
        up = seen.leaf(factors.up, "parameter", f"{name}.weight")
        bias = factors.bias
        if bias is not None:
            bias = seen.leaf(bias, "parameter", f"{name}.bias")
        return lambda x, *_: F.linear(F.linear(x, factors.down), up, bias)

    def _table(self, name: str, rank: int | None, seen: SimulatedRun) -> Any:
        weight = self.unit.linears[name].get_parameter("weight").detach()
        if rank is not None:
            weight = take(weight, 1, self.group.columns[name][rank])
        weight = seen.leaf(weight, "weight", name)
        return lambda ids, *_: F.embedding(ids, weight)

    def _row(
        self, name: str, rank: int | None, seen: SimulatedRun, whole: SimulatedRun | None
    ) -> Any:
        factors = self.unit.factors[name]
        down, bias = factors.down, factors.bias
        if rank is not None:
            down = take(down, 1, self.group.rows[name][rank])
        down = seen.leaf(down, "weight", name)
        if bias is not None:
            bias = seen.leaf(bias, "bias", name)
        calls = seen.sums.setdefault(name, [])

        def forward(x: Tensor, *_: Any) -> Tensor:
            seen.inputs.setdefault(name, []).append(x)
            y = F.linear(F.linear(x, down), factors.up, bias)
            if whole is not None:
                total = whole.sums[name][len(calls)]
                y = y + (total - y).detach() if torch.is_grad_enabled() else total
            calls.append(y.detach())
            return y

        return forward

    def _output(self, name: str, seen: SimulatedRun) -> Any:
        factors = self.unit.factors[name]
        calls = 0

        def forward(x: Tensor, *_: Any) -> Tensor:
            nonlocal calls
            y = factors(x).detach().requires_grad_()
            seen.leaves["cut", name, calls] = y
            calls += 1
            return y

        return forward


def _followed(
    watch: ValueWatch,
    x: Tensor,
    place: tuple[int, int, IndicesByRank],
    rank: int | None,
    *,
    scaled: bool,
) -> Tensor:
    """``x`` marked as divided; whole, it is changed where a rank's part is to stay.

    Args:
        place: dimension, period and each rank's indices inside a period.
    """
    dim, period, rows = place
    if rank is not None:
        watch.mark(x)
        return x
    return watch.source(x, dim, rows, period=period, scaled=scaled)
