"""What the modules of a parallelised model become: the same objects, of a derived class.

Names of modules and parameters, hooks and training flags stay; ``isinstance`` holds as before.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colrow.comm import collectives
from colrow.comm.group import ParallelGroup
from colrow.inplace.calls import Key, ModuleCall
from colrow.inplace.nested import by_features
from colrow.inplace.pairs import Pair
from colrow.inplace.simulate import take_periodic
from colrow.inplace.streams import Stream
from colrow.layers.fused import column_linear, row_linear
from colrow.layers.shared import SharedRows, sum_rows, sum_together
from colrow.partition import Partition


@cache
def _derived(mixin: type, cls: type, first: bool) -> type:
    bases = (mixin, cls) if first else (cls, mixin)
    return type(
        cls.__name__, bases, {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )


def become(module: nn.Module, mixin: type, *, first: bool = True) -> None:
    """Makes ``module`` an instance of ``mixin`` as well; ``first`` puts it before the own class."""
    own: Any = type(module)
    module.__class__ = _derived(mixin, own, first)


class Inner(Protocol):
    """A layer that multiplies the input of another one as well: an adapter's first matrices."""

    def inner(self, x: Tensor) -> dict[str, Tensor]:
        """What it makes of ``x``, by name: of each a rank sees a part of the gradient."""
        ...


@dataclass
class _Entered:
    """A tensor that has been entered.

    Attributes:
        source: the tensor as it was given, and its version then.
        alias: the same, with the gradient summed.
        inner: what others make of it, by their ids.
        users: ids of the layers that have got it.
    """

    source: tuple[weakref.ref[Tensor], int]
    alias: Tensor
    inner: dict[int, dict[str, Tensor]]
    users: set[int]

    def is_for(self, x: Tensor, user: object) -> bool:
        """Whether this layer may get it for ``x``: once, and only while ``x`` is what it was."""
        if self.alias is x:
            return True
        source, version = self.source
        return source() is x and x._version == version and id(user) not in self.users


class Entry:
    """Where replicated activations enter layers whose ranks each see a part of the gradient.

    Layers with one entry that get the same tensor share one all-reduce, and so do adapters of
    theirs.
    """

    def __init__(self, tp: ParallelGroup, layer: str) -> None:
        self.tp, self.layer = tp, layer
        self._last: _Entered | None = None

    def __call__(self, x: Tensor, user: object, others: Sequence[Inner] = ()) -> Tensor:
        """``x``, with the gradient summed over the ranks.

        Args:
            user: the layer that gets it.
            others: what else is computed from ``x`` whose gradient is to be summed.
        """
        if not torch.is_grad_enabled() or not (others or x.requires_grad):
            return x
        if torch.compiler.is_compiling():
            return collectives.copy_to_tp(x, self.tp, layer=self.layer)
        return self.enter(x, user, others)[0]

    def enter(
        self, x: Tensor, user: object, others: Sequence[Inner]
    ) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
        """``x`` and what the others make of it, by their ids; gradients summed in one all-reduce.

        The same again for each layer that gets the same tensor.
        """
        if (last := self._last) is not None and last.is_for(x, user):
            last.users.add(id(user))
            return last.alias, last.inner
        inner = {id(other): other.inner(x) for other in others}
        places = [(one, name) for one in inner.values() for name in one]
        tensors = [x, *(one[name] for one, name in places)]
        for dtype in dict.fromkeys(y.dtype for y in tensors):
            some = [i for i, y in enumerate(tensors) if y.dtype == dtype and y.requires_grad]
            if some:
                summed = sum_together([tensors[i] for i in some], self.tp, self.layer)
                for i, y in zip(some, summed, strict=True):
                    tensors[i] = y
        alias, *rest = tensors
        for (one, name), y in zip(places, rest, strict=True):
            one[name] = y
        source = weakref.ref(x, self._forget)
        self._last = _Entered((source, x._version), alias, inner, {id(user)})
        return alias, inner

    def _forget(self, source: Any) -> None:
        if self._last is not None and self._last.source[0] is source:
            self._last = None

    def __deepcopy__(self, memo: Any) -> Entry:
        return Entry(self.tp, self.layer)

    def __reduce__(self) -> Any:
        return Entry, (self.tp, self.layer)


@dataclass
class Region:
    """Blocks in which every rank has some tokens, while a forward pass is inside them.

    Attributes:
        layer: the name of the list of blocks.
        partition: the tokens; None when every rank has all, as with too few of them.
        inside: whether the pass is in a module that sees whole sequences.
    """

    tp: ParallelGroup
    layer: str
    partition: Partition | None = None
    inside: bool = False


@dataclass
class Column:
    """How a column-parallel layer is split.

    Attributes:
        tp: the tensor-parallel group.
        layer: its name in the model.
        transposed: whether its weight is ``[in, out]``.
        shared: output features that several ranks hold.
        entry: where its input comes from; None when its gradient is summed further up.
        alone: whether no other layer uses that entry.
        region: where the gradient of its input is summed otherwise while tokens are divided.
        stream: random numbers between it and the row-parallel layer; None without dropout.
        pair: what must follow it.
        others: adapters of this layer, and of those of the same entry with the same input.
    """

    tp: ParallelGroup
    layer: str
    transposed: bool
    shared: SharedRows
    entry: Entry | None
    alone: bool
    region: Region | None = None
    stream: Stream | None = None
    pair: Pair | None = None
    others: tuple[Inner, ...] = ()


class ColumnMixin(nn.Module):
    """A layer ``y = x W^T + b`` of which this rank has some output features."""

    colrow: Column
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]``, the same on every rank, to ``[..., out_local]``. Backward: all-reduce."""
        if input.is_nested:
            return by_features(self.forward, input)
        how, x = self.colrow, input
        if how.pair is not None:
            how.pair.column(how.layer)
        weight, bias = self.weight, self.bias
        if how.stream is not None and self.training:
            how.stream.part(x)
        weight = sum_rows(weight, how.tp, how.shared, int(how.transposed), how.layer)
        if bias is not None:
            bias = sum_rows(bias, how.tp, how.shared, 0, how.layer)
        weight = weight.t() if how.transposed else weight
        divided = how.region is not None and how.region.partition is not None
        if how.entry is None or divided:
            return F.linear(x, weight, bias)
        if how.alone:
            return column_linear(x, weight, bias, how.tp, layer=how.layer)
        return F.linear(how.entry(x, self, how.others), weight, bias)

    def extra_repr(self) -> str:
        """Rank and local shape."""
        how = self.colrow
        return (
            f"column-parallel, local={list(self.weight.shape)}, tp_rank={how.tp.rank}/{how.tp.size}"
        )


@dataclass
class Row:
    """How a row-parallel layer is split; attributes as in :class:`Column`.

    Attributes:
        region: where its result is divided by tokens while they are.
    """

    tp: ParallelGroup
    layer: str
    transposed: bool
    region: Region | None = None
    stream: Stream | None = None
    pair: Pair | None = None


class RowMixin(nn.Module):
    """A layer ``y = x W^T + b`` of which this rank has some input features."""

    colrow: Row
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_local]`` to ``[..., out]`` on every rank. Forward: all-reduce.

        To this rank's tokens where they are divided. Forward: reduce-scatter; backward: all-gather.
        """
        if input.is_nested:
            return by_features(self.forward, input)
        how, x = self.colrow, input
        if how.pair is not None:
            how.pair.row()
        if how.stream is not None:
            how.stream.join(x)
        weight = self.weight.t() if how.transposed else self.weight
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{how.layer} holds {weight.shape[1]} input features on this rank, but got an "
                f"input of {x.shape[-1]}"
            )
        tokens = how.region.partition if how.region is not None else None
        y = row_linear(x, weight, how.tp, sequence=tokens, layer=how.layer)
        if tokens is not None and y._is_view():
            y = y.clone()  # so that it may be written into
        bias = self.bias
        if bias is not None and tokens is not None:
            bias = sum_rows(bias, how.tp, SharedRows.whole(bias.shape[0]), 0, how.layer)
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Rank and local shape."""
        how = self.colrow
        return f"row-parallel, local={list(self.weight.shape)}, tp_rank={how.tp.rank}/{how.tp.size}"


class OutputCut:
    """A forward hook: every rank has a part of this output's gradient. Backward: all-reduce."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The output."""
        return self.entry(output, self)


class Sum:
    """A forward hook: the ranks' results are parts of a sum. Forward: all-reduce."""

    def __init__(self, tp: ParallelGroup, layer: str) -> None:
        self.tp, self.layer = tp, layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The sum."""

        def change(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return collectives.reduce_from_tp(leaf, self.tp, layer=self.layer)
            return leaf

        return pytree.tree_map(change, output)


@dataclass
class Arguments:
    """What happens to the tensors that a module is given.

    Attributes:
        names: its positional arguments.
        partial: tensors of whose gradient a rank sees a part: an all-reduce in backward.
        taken: tensors of which a rank needs a part: dimension, period, and its indices.
    """

    tp: ParallelGroup
    layer: str
    names: tuple[str, ...]
    partial: frozenset[Key]
    taken: dict[Key, tuple[int, int, list[int]]] = field(default_factory=dict)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the module should see them; a forward pre-hook."""

        def change(key: Key, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if key in self.taken:
                dim, period, indices = self.taken[key]
                # What another split module made for this rank is there already.
                if leaf.dim() > dim and leaf.shape[dim] % period == 0:
                    if leaf.requires_grad and torch.is_grad_enabled():
                        leaf = collectives.copy_to_tp(leaf, self.tp, layer=self.layer)
                    return take_periodic(leaf, dim, period, indices)
                return leaf
            if key in self.partial and leaf.requires_grad and torch.is_grad_enabled():
                return collectives.copy_to_tp(leaf, self.tp, layer=self.layer)
            return leaf

        wanted = {name for name, _ in (*self.partial, *self.taken)}
        call = ModuleCall(args, kwargs).mapped(self.names, change, only=wanted)
        return call.args, call.kwargs
