"""Gradients that are summed over ranks, at parameters and where activations enter split layers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from colrow.comm import collectives
from colrow.comm.group import ParallelGroup
from colrow.layers.shared import sum_together


class Adapter(Protocol):
    """An adapter, whose first matrices multiply the input of the layer that it wraps."""

    def inner(self, x: Tensor) -> dict[str, Tensor]:
        """The products with ``x``, by name; of the gradient of each a rank sees a part."""
        ...


@dataclass
class _Entered:
    """An activation that layers with one entry were given last.

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


class ColumnEntry:
    """Where replicated activations enter layers whose ranks each see a part of the gradient.

    Layers with one entry that get the same tensor share one all-reduce, and so do adapters of
    theirs.
    """

    def __init__(self, tp: ParallelGroup, layer: str) -> None:
        self.tp, self.layer = tp, layer
        self._last: _Entered | None = None

    def __call__(self, x: Tensor, user: object, others: Sequence[Adapter] = ()) -> Tensor:
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
        self, x: Tensor, user: object, others: Sequence[Adapter]
    ) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
        """``x`` and what the adapters compute from it, by their ids; see :meth:`__call__`.

        Their gradients are summed in one all-reduce. Layers that get the same tensor get the same
        results, so that the sum is made once for all of them.
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

    def __deepcopy__(self, memo: Any) -> ColumnEntry:
        return ColumnEntry(self.tp, self.layer)

    def __reduce__(self) -> Any:
        return ColumnEntry, (self.tp, self.layer)


class SumOutputGradient:
    """A forward hook: every rank has a part of this output's gradient. Backward: all-reduce."""

    def __init__(self, entry: ColumnEntry) -> None:
        self.entry = entry

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The output."""
        return self.entry(output, self)
