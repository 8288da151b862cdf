"""Modes that follow divided values through a forward pass, for :class:`ValueWatch`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from colrow.inplace.observe import operations
from colrow.inplace.observe.modes import FunctionMode
from colrow.inplace.observe.operations import place_in_code
from colrow.inplace.observe.watch import ValueWatch


@contextmanager
def following(watch: ValueWatch | None) -> Iterator[None]:
    """Inside it, ``watch`` sees every operation on divided values; None sees nothing."""
    if watch is None:
        yield
        return
    with _Operations(watch), _Functions(watch):
        yield


class _Operations(TorchDispatchMode):
    """Follows divided values through ATen's operations."""

    supports_higher_order_operators = True

    def __init__(self, watch: ValueWatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Computes what is asked for, and marks what comes of divided values."""
        watch, options = self.watch, dict(kwargs or {})
        leaves = pytree.tree_leaves((args, options)) if watch.follows else []
        if leaves and watch.remembers and not operations.reads_no_values(func):
            watch.sees_earlier(leaves, args[:1] if operations.overwrites(func) else ())
        mine = [x for x in leaves if watch.is_divided(x)]
        if not mine or operations.uses_shape_only(func):
            return func(*args, **options)
        name = operations.name_of(func)
        if not watch.judges:
            result = func(*args, **options)
            for x in (*pytree.tree_leaves(result), *_written(func, args)):
                if isinstance(x, Tensor):
                    watch.mark(x)
            return result
        watch.touched.add(f"{name}{place_in_code()}")
        if operations.reads(func):
            watch.reads("a number from divided values")
        sized = any(map(watch.is_divided, operations.sizing(func, tuple(args))))
        if sized and name not in ("index", "masked_select"):
            watch.reads("a size that depends on divided values")
        elementwise = operations.is_elementwise(func)
        ragged = any(map(watch.is_ragged, mine))
        if ragged and not elementwise and name not in ("index_put", "masked_scatter"):
            watch.reads("values chosen by divided values")
        place = f"{name}{place_in_code()}" if watch.style else ""
        hides = not operations.shows(func)
        floating = [x for x in mine if x.is_floating_point()]
        if watch.style and hides:
            for x in floating:
                watch.note(x, place, exact=False)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        kept: list[Tensor] = []
        if watch.style and hides and elementwise and all(x.is_floating_point() for x in tensors):
            kept = [x.detach().clone() for x in floating]
        compared = [x.detach().clone() for x in mine] if operations.gives_truth(func) else []
        result = func(*args, **options)
        given = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        for x in (*given, *_written(func, args)):
            watch.mark(x, ragged=sized or (ragged and elementwise))
        discrete = [x for x in given if not (x.is_floating_point() or x.is_complex())]
        if watch.style and discrete and not hides:
            for x in floating:
                watch.note(x, place, exact=False)
        if watch.backward and hides:
            shapes = {x.shape for x in (*floating, *given)}
            if not elementwise or len(shapes) > 1:
                watch.reads(f"what it decides by ({name}) from divided values")
        if not watch.decided and (hides or discrete):
            watch.decided = f"it decides by {place or name + place_in_code()}"
        if watch.style is None:
            return result
        if compared and discrete and discrete[0].dtype == torch.bool:
            watch.places.add(place)
            watch.answers(compared, discrete[0], place)
        elif kept and given and given[0].is_floating_point():
            _show(kept, given[0])
        for x in discrete:
            watch.note(x, place, exact=True)
        return result


def _written(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """The arguments into which an operation writes."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    return [
        x
        for argument, value in zip(schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for x in pytree.tree_leaves(value)
        if isinstance(x, Tensor)
    ]


def _show(kept: list[Tensor], result: Tensor) -> None:
    """In place of what an operation selects, the sum of what it selects from."""
    try:
        parts = [torch.broadcast_to(x, result.shape) for x in kept]
    except RuntimeError:
        return
    result.copy_(reduce(torch.add, parts))


class _Functions(FunctionMode):
    """Sees what leaves tensors without an operation: lists, arrays, text, sizes, copies."""

    def __init__(self, watch: ValueWatch) -> None:
        super().__init__()
        self.watch = watch

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Computes what is asked for."""
        watch = self.watch
        result = func(*args, **kwargs)
        if not watch.follows:
            return result
        given = pytree.tree_leaves((args, kwargs))
        mine = [x for x in given if watch.is_divided(x)]
        if watch.remembers and not mine:
            mine = [x for x in given if watch.is_earlier(x)]
        if not (mine and watch.judges):
            return result
        if any(map(watch.is_ragged, mine)) and operations.tells_size(func):
            watch.reads("a size that depends on divided values")
        leaves = pytree.tree_leaves(result)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if getattr(func, "__name__", "") in operations.COPIES:
            if not isinstance(args[0], Tensor):
                watch.reads("numbers from divided values")
            for x in tensors:
                watch.mark(x)
        elif not tensors and any(x is not None for x in leaves) and operations.tells_values(func):
            watch.reads("numbers from divided values")
        return result
