"""A call of a module as a value: its arguments by name, and the tensors inside them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Key = tuple[str, int]
"""An argument's name, and the number of the tensor inside it."""


@dataclass(frozen=True)
class ModuleCall:
    """What a module was called with.

    Attributes:
        args, kwargs: as given.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def mapped(
        self,
        names: tuple[str, ...],
        change: Callable[[Key, Any], Any],
        *,
        only: set[str] | None = None,
    ) -> ModuleCall:
        """The call with every leaf of its arguments replaced by ``change(key, leaf)``.

        Args:
            names: those of the positional arguments.
            only: the arguments in question; all by default.
        """

        def value_of(name: str, value: Any) -> Any:
            return value if only is not None and name not in only else _map(name, value, change)

        args = tuple(
            value_of(names[i] if i < len(names) else f"*{i}", value)
            for i, value in enumerate(self.args)
        )
        return ModuleCall(args, {k: value_of(k, value) for k, value in self.kwargs.items()})


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the positional arguments of the module's forward."""
    forward = module.forward
    if isinstance(forward, MethodType) and isinstance(forward.__func__, FunctionType):
        return method_argument_names(forward.__func__)
    return _positional(forward)


@cache
def method_argument_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the positional arguments of a class's method, ``self`` left out."""
    return _positional(function)[1:]


def _positional(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)


def _map(name: str, value: Any, change: Callable[[Key, Any], Any]) -> Any:
    if value is None or isinstance(value, Tensor | int | float | str):
        return change((name, 0), value)
    leaves, spec = pytree.tree_flatten(value)
    return pytree.tree_unflatten([change((name, i), x) for i, x in enumerate(leaves)], spec)


def private(leaf: Any) -> Any:
    """A copy of an argument that the callee may change, such as a cache; tensors as they are."""
    if isinstance(leaf, Tensor | nn.Module) or leaf is None or isinstance(leaf, int | float | str):
        return leaf
    return copy.deepcopy(leaf)


def tensors_of(value: Any) -> list[Tensor]:
    """The floating-point tensors in a module's result, in order."""
    leaves = pytree.tree_leaves(value)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def as_double(leaf: Any) -> Any:
    """Floating-point tensors on the CPU in fp64, other tensors on the CPU."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach().cpu()
    return leaf.to(torch.float64) if leaf.is_floating_point() else leaf
