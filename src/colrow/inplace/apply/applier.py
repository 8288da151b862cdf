"""Carries out proven splits on the model itself, and keeps what would undo them."""

from __future__ import annotations

from functools import cache, partial
from operator import setitem
from typing import Any

from torch import nn

from colrow.inplace.apply.gradients import ColumnEntry, SumOutputGradient
from colrow.inplace.apply.layers import ColumnMixin, ColumnSplit, RowMixin, RowSplit
from colrow.inplace.apply.modules import (
    ArgumentHook,
    GatheredParameter,
    ParametersMixin,
    PartialGradient,
    SubtractBaseMixin,
    SumResults,
    begin_forward,
    end_forward,
)
from colrow.inplace.apply.pairs import Pair, Stream
from colrow.inplace.apply.parameters import keep_part
from colrow.inplace.apply.record import SplitRecord
from colrow.inplace.find.layer_groups import IndicesByRank
from colrow.inplace.find.local_sizes import set_sizes
from colrow.inplace.find.proof import Proof
from colrow.inplace.find.shard_groups import indices_by_rank, spec_of_rows
from colrow.inplace.observe.calls import argument_names, full_name
from colrow.inplace.observe.linear_layers import linear_kind, output_dim
from colrow.inplace.observe.modes import drops_out
from colrow.layers.shared_rows import SharedRows
from colrow.partition import Partition, ShardSpec


class Applier:
    """Divides parameters and changes modules of one model.

    Args:
        model: the model, or a part of it.
        name: of the part in the model.
    """

    def __init__(self, model: nn.Module, record: SplitRecord, name: str = "") -> None:
        self.model, self.record = model, record
        self.tp = record.tp
        self._names: dict[int, list[str]] = {}
        self.paths: dict[int, str] = {}  # of modules, by id
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(module), path)
            for last, parameter in module._parameters.items():
                if parameter is not None:
                    full = full_name(full_name(name, path) if path else name, last)
                    self._names.setdefault(id(parameter), []).append(full)
        record.names |= frozenset(name for names in self._names.values() for name in names)
        self._split: dict[int, ShardSpec] = {}
        self.members = frozenset(self.paths)
        # Of proofs: parameters that are used without a layer, with their owner and the pair.
        self.used_directly: dict[int, tuple[nn.Module, set[str], Pair | None]] = {}
        self._expected: set[tuple[int, str]] = set()
        self._dropping: dict[int, bool] = {}  # configurations
        self._specs: dict[
            Any, tuple[ShardSpec, IndicesByRank]
        ] = {}  # the rows stay, so that ids are unique

    def split(self, module: nn.Module, name: str, dim: int, rows: IndicesByRank) -> None:
        """Leaves this rank's indices of a parameter, in every module that holds it."""
        self.expect_shard(module, name)
        whole = module._parameters[name]
        if whole is None or id(whole) in self._split:
            return
        spec = self._spec(tuple(whole.shape), dim, rows)
        self.record.undo.append(keep_part(whole, spec, self.tp.rank))
        self._split[id(whole)] = spec
        for full in self._names[id(whole)]:
            self.record.specs[full] = spec

    def split_outputs(self, layer: nn.Module, dim: int, rows: IndicesByRank) -> None:
        """Leaves this rank's output features of a layer; ``dim`` is theirs in its weight."""
        self.split(layer, "weight", dim, rows)
        if layer._parameters.get("bias") is not None:
            self.split(layer, "bias", 0, rows)

    def expect_shard(self, module: nn.Module, name: str) -> None:
        """Notes that this module's code is made for a part of this parameter."""
        self._expected.add((id(module), name))

    def expects_shard(self, module: nn.Module, name: str) -> bool:
        """Whether this module's code is made for a part of this parameter."""
        return (id(module), name) in self._expected

    def spec_of(self, parameter: nn.Parameter | None) -> ShardSpec | None:
        """How a parameter has been divided; None for one that is whole."""
        return self._split.get(id(parameter))

    def names_of(self, module: nn.Module, name: str) -> list[str]:
        """All names of a parameter that has been divided."""
        return self._names[id(module._parameters[name])]

    def _spec(self, shape: tuple[int, ...], dim: int, rows: IndicesByRank) -> ShardSpec:
        """Computed once for all blocks of one kind, which share their rows."""
        key = shape, dim, id(rows)
        if key not in self._specs:
            self._specs[key] = spec_of_rows(shape, dim, rows), rows
        return self._specs[key][0]

    def change_class(self, module: nn.Module, mixin: type, *, first: bool = True) -> None:
        """Makes ``module`` a ``mixin`` too; ``first`` puts that before the module's own class."""
        own: Any = type(module)
        module.__class__ = _derived(mixin, own, first)
        self.record.undo.append(partial(setattr, module, "__class__", own))

    def attach(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets an attribute that the module's new class reads."""
        module.__dict__[name] = value
        self.record.undo.append(partial(module.__dict__.pop, name, None))

    def hook(self, handle: Any) -> None:
        """Keeps the handle of a hook, to remove it if the split is undone."""
        self.record.undo.append(handle.remove)

    def split_group(self, name: str, proof: Proof) -> None:
        """Splits a group of layers inside the module of this name."""
        module = self.model.get_submodule(name)
        group, rank = proof.group, self.tp.rank
        names = argument_names(module)
        entries: dict[str, ColumnEntry] = {}
        stream = Stream(self.tp) if drops_out(module, self._dropping) else None
        pair = None
        if group.columns or group.parameters:
            pair = Pair(name, bool(group.rows and proof.local_sizes[rank]))
            self.hook(module.register_forward_pre_hook(pair.enter))
            self.hook(module.register_forward_hook(pair.leave))
        entered = [c for c in group.columns if c not in proof.cuts.uncut]
        for layer, rows in group.columns.items():
            self._column(name, module, layer, rows, proof, entries, alone=len(entered) == 1)
        for layer, rows in group.rows.items():
            target = module.get_submodule(layer)
            kind = linear_kind(target)
            assert kind is not None
            self.split(target, "weight", 1 - output_dim(kind), rows)
            how = RowSplit(
                self.tp, full_name(name, layer), kind == "conv1d", stream=stream, pair=pair
            )
            self.attach(target, "colrow", how)
            self.change_class(target, RowMixin)
        for layer in group.columns:
            column = module.get_submodule(layer).__dict__.get("colrow")
            if isinstance(column, ColumnSplit):
                column.stream, column.pair = stream, pair
        for path, (dim, rows) in group.parameters.items():
            owner, _, last = path.rpartition(".")
            target = module.get_submodule(owner)
            self.split(target, last, dim, rows)
            self.used_directly.setdefault(id(target), (target, set(), pair))[1].add(last)
        for layer in proof.cuts.outputs:
            entry = ColumnEntry(self.tp, full_name(name, layer))
            self.hook(module.get_submodule(layer).register_forward_hook(SumOutputGradient(entry)))
        for path in sorted(proof.shared):
            owner, _, last = path.rpartition(".")
            target = module.get_submodule(owner)
            self.sum_gradient(
                target, last, full_name(name, path), counted_once=path in proof.counted_once
            )
        if proof.base_without and rank:
            self.attach(module, "colrow_base_without", proof.base_without)
            self.change_class(module, SubtractBaseMixin)
        if proof.summed:
            self.hook(module.register_forward_hook(SumResults(self.tp, name)))
        summed = frozenset(proof.partial_arguments)
        taken = {
            key: (dim, period, rows[rank]) for key, (dim, period, rows) in group.arguments.items()
        }
        if summed or taken:
            how_called = ArgumentHook(self.tp, name, names, summed, taken)
            self.hook(module.register_forward_pre_hook(how_called, with_kwargs=True))
        for target, attribute, value in set_sizes(module, proof.local_sizes[rank]):
            self.record.undo.append(partial(setitem, target.__dict__, attribute, value))

    def _column(
        self,
        name: str,
        module: nn.Module,
        layer: str,
        rows: IndicesByRank,
        proof: Proof,
        entries: dict[str, ColumnEntry],
        *,
        alone: bool,
    ) -> None:
        target = module.get_submodule(layer)
        kind = linear_kind(target)
        assert kind is not None
        dim = output_dim(kind)
        weight: Any = target.weight
        spec = self._spec(tuple(weight.shape), dim, rows)
        shared = SharedRows.of(spec, self.tp.rank)
        self.split_outputs(target, dim, rows)
        if kind == "embedding":
            return
        entry = None
        if layer not in proof.cuts.uncut:
            entry = entries.setdefault("", ColumnEntry(self.tp, name))
        self.attach(
            target,
            "colrow",
            ColumnSplit(self.tp, full_name(name, layer), kind == "conv1d", shared, entry, alone),
        )
        self.change_class(target, ColumnMixin)

    def sum_gradient(self, owner: nn.Module, name: str, path: str, *, counted_once: bool) -> None:
        """Sums the gradient of a parameter of which every rank sees a part."""
        self._directly(owner)
        owner.__dict__["colrow_shared"][name] = PartialGradient(self.tp, path, counted_once)

    def gather_when_used(self, owner: nn.Module, name: str, path: str, dim: int) -> None:
        """Divides a parameter that is gathered whenever its owner uses it."""
        whole: Any = owner._parameters[name]
        partition = Partition.even(whole.shape[dim], self.tp.size)
        self.split(owner, name, dim, indices_by_rank(partition))
        self._directly(owner)
        if "colrow_spread" not in owner.__dict__:
            self.attach(owner, "colrow_spread", {})
            self.hook(owner.register_forward_pre_hook(begin_forward))
            self.hook(owner.register_forward_hook(end_forward, always_call=True))
        owner.__dict__["colrow_spread"][name] = GatheredParameter(self.tp, path, dim, partition)

    def _directly(self, target: nn.Module) -> None:
        """Makes the module read its parameters through :class:`ParametersMixin`."""
        if "colrow_shared" not in target.__dict__:
            self.attach(target, "colrow_shared", {})
            self.change_class(target, ParametersMixin)


@cache
def _derived(mixin: type, cls: Any, first: bool) -> Any:
    bases = (mixin, cls) if first else (cls, mixin)
    return type(
        cls.__name__, bases, {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )
