"""Carries a proven split out on the model itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from colrow.inplace.atoms import spec_of_rows
from colrow.inplace.calls import argument_names
from colrow.inplace.keep import keep_part
from colrow.inplace.locals import apply_setting
from colrow.inplace.modules import (
    Arguments,
    Column,
    ColumnMixin,
    Entry,
    OutputCut,
    Row,
    RowMixin,
    Sum,
    become,
)
from colrow.inplace.pairs import Pair
from colrow.inplace.parameters import (
    LessMixin,
    ParametersMixin,
    Shared,
    Spread,
    begin_forward,
    end_forward,
)
from colrow.inplace.prove import Proof
from colrow.inplace.record import Record
from colrow.inplace.search import Rows
from colrow.inplace.streams import Stream, drops_out
from colrow.inplace.unit import linear_kind, output_dim
from colrow.layers.shared import SharedRows
from colrow.partition import Partition, ShardSpec


class Applier:
    """Splits parameters and changes modules of one model, and keeps what would undo it.

    Args:
        model: the model, or a part of it.
        name: of the part in the model.
    """

    def __init__(self, model: nn.Module, record: Record, name: str = "") -> None:
        self.model, self.record = model, record
        self.tp = record.tp
        self._names: dict[int, list[str]] = {}
        self.paths: dict[int, str] = {}  # of modules, by id
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(module), path)
            for last, parameter in module._parameters.items():
                if parameter is not None:
                    full = _path(_path(name, path) if path else name, last)
                    self._names.setdefault(id(parameter), []).append(full)
        record.names |= frozenset(name for names in self._names.values() for name in names)
        self._split: dict[int, ShardSpec] = {}
        self.members = frozenset(self.paths)
        # Of proofs: parameters that are used without a layer, with their owner and the pair.
        self.used_directly: dict[int, tuple[nn.Module, set[str], Pair | None]] = {}
        self._meant: set[tuple[int, str]] = set()
        self._dropping: dict[int, bool] = {}  # configurations
        self._specs: dict[Any, tuple[ShardSpec, Rows]] = {}  # the rows stay, so that ids are unique

    def split(self, module: nn.Module, name: str, dim: int, rows: Rows) -> None:
        """Keeps this rank's indices of a parameter, wherever it is tied to."""
        self.mean(module, name)
        whole = module._parameters[name]
        if whole is None or id(whole) in self._split:
            return
        spec = self._spec(tuple(whole.shape), dim, rows)
        self.record.undo.append(keep_part(whole, spec, self.tp.rank))
        self._split[id(whole)] = spec
        for full in self._names[id(whole)]:
            self.record.specs[full] = spec

    def mean(self, module: nn.Module, name: str) -> None:
        """Notes that a module knows that this parameter of its is divided."""
        self._meant.add((id(module), name))

    def is_meant(self, module: nn.Module, name: str) -> bool:
        """Whether the module knows it."""
        return (id(module), name) in self._meant

    def spec_of(self, parameter: nn.Parameter | None) -> ShardSpec | None:
        """How a parameter has been divided; None for one that is whole."""
        return self._split.get(id(parameter))

    def names_of(self, module: nn.Module, name: str) -> list[str]:
        """All names of a parameter that has been divided."""
        return self._names[id(module._parameters[name])]

    def _spec(self, shape: tuple[int, ...], dim: int, rows: Rows) -> ShardSpec:
        """Computed once for all blocks of one kind, which share their rows."""
        key = shape, dim, id(rows)
        if key not in self._specs:
            self._specs[key] = spec_of_rows(shape, dim, rows), rows
        return self._specs[key][0]

    def _later(self, where: dict[str, Any], name: str, value: Any) -> None:
        def step() -> None:
            where[name] = value

        self.record.undo.append(step)

    def _forget(self, module: nn.Module, name: str) -> None:
        self.record.undo.append(lambda: module.__dict__.pop(name, None) and None)

    def change_class(self, module: nn.Module, mixin: type, *, first: bool = True) -> None:
        """See :func:`colrow.inplace.modules.become`."""
        before = type(module)
        become(module, mixin, first=first)

        def step() -> None:
            module.__class__ = before

        self.record.undo.append(step)

    def attach(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets an attribute that the module's new class reads."""
        module.__dict__[name] = value
        self._forget(module, name)

    def hook(self, handle: Any) -> None:
        """Keeps a hook's handle."""
        self.record.undo.append(handle.remove)

    def proof(self, name: str, proof: Proof) -> None:
        """Splits a group of layers inside the module of this name."""
        module = self.model.get_submodule(name)
        group, rank = proof.group, self.tp.rank
        names = argument_names(module)
        entries: dict[str, Entry] = {}
        stream = Stream(self.tp) if drops_out(module, self._dropping) else None
        pair = None
        if group.columns or group.parameters:
            pair = Pair(name, bool(group.rows and proof.settings[rank]))
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
            how = Row(self.tp, _path(name, layer), kind == "conv1d", stream=stream, pair=pair)
            self.attach(target, "colrow", how)
            self.change_class(target, RowMixin)
        for layer in group.columns:
            column = module.get_submodule(layer).__dict__.get("colrow")
            if isinstance(column, Column):
                column.stream, column.pair = stream, pair
        for path, (dim, rows) in group.parameters.items():
            owner, _, last = path.rpartition(".")
            target = module.get_submodule(owner)
            self.split(target, last, dim, rows)
            self.used_directly.setdefault(id(target), (target, set(), pair))[1].add(last)
        for layer in proof.cuts.outputs:
            entry = Entry(self.tp, _path(name, layer))
            self.hook(module.get_submodule(layer).register_forward_hook(OutputCut(entry)))
        for path in sorted(proof.shared):
            owner, _, last = path.rpartition(".")
            target = module.get_submodule(owner)
            self.share(target, last, _path(name, path), once=path in proof.once)
        if proof.less and rank:
            self.attach(module, "colrow_less", proof.less)
            self.change_class(module, LessMixin)
        if proof.summed:
            self.hook(module.register_forward_hook(Sum(self.tp, name)))
        partial = frozenset(proof.partial_arguments)
        taken = {
            key: (dim, period, rows[rank]) for key, (dim, period, rows) in group.arguments.items()
        }
        if partial or taken:
            how_called = Arguments(self.tp, name, names, partial, taken)
            self.hook(module.register_forward_pre_hook(how_called, with_kwargs=True))
        for target, attribute, value in apply_setting(module, proof.settings[rank]):
            self._later(target.__dict__, attribute, value)

    def _column(
        self,
        name: str,
        module: nn.Module,
        layer: str,
        rows: Rows,
        proof: Proof,
        entries: dict[str, Entry],
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
        self.split(target, "weight", dim, rows)
        if target._parameters.get("bias") is not None:
            self.split(target, "bias", 0, rows)
        if kind == "embedding":
            return
        entry = None
        if layer not in proof.cuts.uncut:
            entry = entries.setdefault("", Entry(self.tp, name))
        self.attach(
            target,
            "colrow",
            Column(self.tp, _path(name, layer), kind == "conv1d", shared, entry, alone),
        )
        self.change_class(target, ColumnMixin)

    def share(self, owner: nn.Module, name: str, path: str, *, once: bool) -> None:
        """Sums the gradient of a parameter of which every rank sees a part."""
        self._directly(owner)
        owner.__dict__["colrow_shared"][name] = Shared(self.tp, path, once)

    def spread(self, owner: nn.Module, name: str, path: str, dim: int) -> None:
        """Divides a parameter that is gathered whenever its owner uses it."""
        whole: Any = owner._parameters[name]
        partition = Partition.even(whole.shape[dim], self.tp.size)
        self.split(owner, name, dim, [list(range(a, b)) for a, b in partition.bounds])
        self._directly(owner)
        if "colrow_spread" not in owner.__dict__:
            self.attach(owner, "colrow_spread", {})
            self.hook(owner.register_forward_pre_hook(begin_forward))
            self.hook(owner.register_forward_hook(end_forward, always_call=True))
        owner.__dict__["colrow_spread"][name] = Spread(self.tp, path, dim, partition)

    def _directly(self, target: nn.Module) -> None:
        """Makes the module read its parameters through :class:`ParametersMixin`."""
        if "colrow_shared" not in target.__dict__:
            self.attach(target, "colrow_shared", {})
            self.change_class(target, ParametersMixin)


def _path(module: str, inner: str) -> str:
    return f"{module}.{inner}" if module else inner
