"""One rank's part of a module, run in this process, with what the other ranks would send.

The sum over ranks at a row-parallel layer has the value that the whole module had there, and the
derivative that an all-reduce with identity backward has. Where an all-reduce of gradients belongs,
the graph is cut and the ranks' parts are collected, to be added up by whoever compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colrow.inplace.calls import Key, tensors_of
from colrow.inplace.locals import Setting, applied
from colrow.inplace.search import Group, Rows
from colrow.inplace.unit import Unit
from colrow.inplace.watch import Watch


@dataclass
class Observed:
    """What happened in a run.

    Attributes:
        inputs: of each row-parallel layer, call by call.
        sums: what each row-parallel layer gave.
        results: the floating-point tensors that the module gave.
        leaves: what gradients are taken of: ("weight", layer), ("bias", layer), ("parameter",
            name), ("argument", key), ("cut", layer, call), ("direct", name) for the weights of
            layers, which nothing but the layers should use.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    results: list[Tensor] = field(default_factory=list)
    leaves: dict[Any, Tensor] = field(default_factory=dict)

    def gradients(self, cotangents: list[Tensor]) -> dict[Any, Tensor]:
        """Of the sum of the results times these cotangents, by leaf."""
        pairs = [(y, c) for y, c in zip(self.results, cotangents, strict=True) if y.requires_grad]
        names = list(self.leaves)
        grads = torch.autograd.grad(
            [y for y, _ in pairs],
            [self.leaves[name] for name in names],
            [c for _, c in pairs],
            allow_unused=True,
        )
        return {
            name: torch.zeros_like(self.leaves[name]) if grad is None else grad
            for name, grad in zip(names, grads, strict=True)
            if grad is not None or name[0] != "direct"
        }


def watched_gradients(whole: Observed, watch: Watch, cotangents: list[Tensor]) -> Any:
    """As :meth:`Observed.gradients`; what its backward pass reads is noted too."""
    watch.backward = True
    try:
        with watch:
            return whole.gradients(cotangents)
    finally:
        watch.backward = False


@dataclass(frozen=True)
class Cuts:
    """Where the gradients of all ranks are added up.

    Attributes:
        uncut: column-parallel layers whose input is not such a place.
        outputs: whole layers whose output is one instead.
    """

    uncut: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()


class Simulation:
    """Runs of one unit, whole or as a rank of a group."""

    def __init__(self, unit: Unit, group: Group, cuts: Cuts | None = None) -> None:
        self.unit, self.group, self.cuts = unit, group, cuts or Cuts()
        self.cotangents: list[Tensor] = []

    def whole(
        self,
        *,
        connected: bool = False,
        watch: Watch | None = None,
        sums: Observed | None = None,
    ) -> Observed:
        """The unsplit module.

        Args:
            connected: leaves the graph uncut.
            watch: follows what the group divides.
            sums: the run whose sums row-parallel layers give; their own by default.
        """
        seen = Observed()
        forwards = {
            name: self._column(name, None, seen, cut=not connected and name not in self.cuts.uncut)
            for name in self.group.columns
        }
        forwards |= {name: self._row(name, None, seen, sums) for name in self.group.rows}
        if not connected:
            forwards |= {name: self._output(name, seen) for name in self.cuts.outputs}
        return self._run(seen, forwards, None, {}, watch)

    def rank(
        self, rank: int, setting: Setting, whole: Observed, watch: Watch | None = None
    ) -> Observed:
        """The part of one rank."""
        seen = Observed()
        forwards = {
            name: self._column(name, rank, seen, cut=name not in self.cuts.uncut)
            for name in self.group.columns
        }
        forwards |= {name: self._row(name, rank, seen, whole) for name in self.group.rows}
        forwards |= {name: self._output(name, seen) for name in self.cuts.outputs}
        return self._run(seen, forwards, rank, setting, watch)

    def _run(
        self,
        seen: Observed,
        forwards: dict[str, Any],
        rank: int | None,
        setting: Setting,
        watch: Watch | None,
    ) -> Observed:
        def leaf(key: Key, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            floating = value.is_floating_point()
            if floating:
                value = value.clone().requires_grad_()
                seen.leaves["argument", key] = value
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
        parameters = {}
        for name, parameter in self.unit.module.named_parameters():
            if any(name.startswith(prefix) for prefix in skip):
                seen.leaves["direct", name] = parameter.detach().requires_grad_()
                continue
            parameters[name] = local = parameter.detach()
            if rank is not None and name in self.group.parameters:
                dim, rows = self.group.parameters[name]
                local = take(local, dim, rows[rank])
            seen.leaves["parameter", name] = local.clone().requires_grad_()
        local_parameters = {n: seen.leaves["parameter", n] for n in parameters}
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
        manager = applied(self.unit.module, setting) if setting else nullcontext()
        with manager, _with_parameters(self.unit.module, local_parameters):
            result = self.unit.run(leaf, forwards, nullcontext() if watch is None else watch)
        seen.results = tensors_of(result)
        if watch is not None:
            watch.end(pytree.tree_leaves(result), summed=not self.group.rows)
        return seen

    def _watched(self, watch: Watch, forwards: dict[str, Any], rank: int | None) -> dict[str, Any]:
        """The layers of the group, between which values are divided."""

        def column(forward: Any, rows: Rows) -> Any:
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

    def _column(self, name: str, rank: int | None, seen: Observed, *, cut: bool) -> Any:
        if name not in self.unit.factors:
            return self._table(name, rank, seen)
        factors = self.unit.factors[name]
        up, bias = factors.up, factors.bias
        if rank is not None:
            up = take(up, 0, self.group.columns[name][rank])
            bias = None if bias is None else take(bias, 0, self.group.columns[name][rank])
        seen.leaves["weight", name] = up = up.clone().requires_grad_()
        if bias is not None:
            seen.leaves["bias", name] = bias = bias.clone().requires_grad_()
        calls = 0

        def forward(x: Tensor, *_: Any) -> Tensor:
            nonlocal calls
            if cut:
                x = x.detach().requires_grad_()
                seen.leaves["cut", name, calls] = x
            calls += 1
            return F.linear(F.linear(x, factors.down), up, bias)

        return forward

    def _plain(self, name: str, seen: Observed) -> Any:
        factors = self.unit.factors[name]
        seen.leaves["parameter", f"{name}.weight"] = up = factors.up.clone().requires_grad_()
        bias = factors.bias
        if bias is not None:
            seen.leaves["parameter", f"{name}.bias"] = bias = bias.clone().requires_grad_()
        return lambda x, *_: F.linear(F.linear(x, factors.down), up, bias)

    def _table(self, name: str, rank: int | None, seen: Observed) -> Any:
        weight = self.unit.linears[name].get_parameter("weight").detach()
        if rank is not None:
            weight = take(weight, 1, self.group.columns[name][rank])
        seen.leaves["weight", name] = weight = weight.clone().requires_grad_()
        return lambda ids, *_: F.embedding(ids, weight)

    def _row(self, name: str, rank: int | None, seen: Observed, whole: Observed | None) -> Any:
        factors = self.unit.factors[name]
        down, bias = factors.down, factors.bias
        if rank is not None:
            down = take(down, 1, self.group.rows[name][rank])
        seen.leaves["weight", name] = down = down.clone().requires_grad_()
        if bias is not None:
            seen.leaves["bias", name] = bias = bias.clone().requires_grad_()
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

    def _output(self, name: str, seen: Observed) -> Any:
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
    watch: Watch, x: Tensor, place: tuple[int, int, Rows], rank: int | None, *, scaled: bool
) -> Tensor:
    """``x`` marked as divided; whole, it is changed where a rank's part is to stay.

    Args:
        place: dimension, period and each rank's indices inside a period.
    """
    dim, period, rows = place
    if rank is not None:
        watch.mark(x)
        return x

    def held(of: int) -> Tensor:
        mask = torch.zeros(period, dtype=torch.bool)
        mask[rows[of]] = True
        return mask.repeat(x.shape[dim] // period)

    return watch.source(x, dim, held, scaled=scaled)


def take(x: Tensor, dim: int, indices: list[int]) -> Tensor:
    """These indices along ``dim``."""
    return x.index_select(dim, torch.tensor(indices, dtype=torch.long, device=x.device))


def take_periodic(x: Tensor, dim: int, period: int, indices: list[int]) -> Tensor:
    """These indices of each period along ``dim``."""
    length = x.shape[dim]
    if length % period:
        raise ValueError(f"dimension {dim} of shape {tuple(x.shape)} is not made of {period}s")
    parts = x.unflatten(dim, (length // period, period))
    return take(parts, dim + 1, indices).flatten(dim, dim + 1)


@contextmanager
def _with_parameters(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    places = []
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        places.append((owner, last, owner._parameters[last]))
        parameters: dict[str, Any] = owner._parameters
        parameters[last] = tensor
    try:
        yield
    finally:
        for owner, last, before in places:
            owner._parameters[last] = before
