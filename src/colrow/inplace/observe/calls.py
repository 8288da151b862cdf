"""Calls of a model's modules: captured in a forward pass, as values, and which are of one kind."""

from __future__ import annotations

import copy
import enum
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colrow.inplace.observe.modes import run_example

# Numbers of a layer that say where it is and not what it does.
_PLACES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "idx"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEEPEST = 4

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
        """The call with every leaf (tensor or plain value) replaced by ``change(key, leaf)``.

        Args:
            names: those of the positional arguments.
            only: names of the arguments to change; all by default.
        """

        def value_of(name: str, value: Any) -> Any:
            return value if only is not None and name not in only else _map(name, value, change)

        args = tuple(
            value_of(names[i] if i < len(names) else f"*{i}", value)
            for i, value in enumerate(self.args)
        )
        return ModuleCall(args, {k: value_of(k, value) for k, value in self.kwargs.items()})

    def tensors(self, names: tuple[str, ...]) -> dict[Key, Tensor]:
        """The tensors in the arguments."""
        found: dict[Key, Tensor] = {}

        def keep(key: Key, leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                found[key] = leaf
            return leaf

        self.mapped(names, keep)
        return found


def full_name(module: str, inner: str) -> str:
    """The name in the model of what is called ``inner`` in one of its modules ("" is the model)."""
    return f"{module}.{inner}" if module else inner


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


def capture_calls(
    model: nn.Module, batches: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, ModuleCall], list[Tensor]]:
    """The first call of every module inside ``model`` during forward passes, by name.

    Calls with nested tensors are left out. Batches after the first may be ones that the model does
    not take.

    Returns:
        The calls, and the floating-point results for the first batch.
    """
    calls: dict[str, ModuleCall] = {}
    results: list[Tensor] = []

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in calls and not any(map(_is_nested, pytree.tree_leaves((args, kwargs)))):
                calls[name] = ModuleCall(args, kwargs).mapped((), lambda _, leaf: _copied(leaf))

        return keep

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in model.named_modules():
            if next(module.parameters(), None) is not None:
                handle = module.register_forward_pre_hook(hook(name), with_kwargs=True)
                hooks.enter_context(handle)
        for number, batch in enumerate(batches):
            try:
                result = run_example(model, batch)
            except Exception:  # whatever the model's code raises
                if number == 0:
                    raise
                continue
            if number == 0:
                results = [y.detach().clone() for y in tensors_of(result)]
    return calls, results


def _is_nested(leaf: Any) -> bool:
    """Whether it is a tensor of rows of different lengths, with which nothing is tried."""
    return isinstance(leaf, Tensor) and leaf.is_nested


def _copied(leaf: Any) -> Any:
    """The leaf as it is now: the model may go on to change it, as it does a cache."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else private(leaf)


def kind_of(module: nn.Module, call: ModuleCall | None) -> Any:
    """A value that is equal for modules that compute the same, so that one is analysed for all.

    Args:
        call: with arguments of these shapes; None for any.
    """
    inner = tuple(
        (name, type(m), m.training, tuple(_facts(m))) for name, m in module.named_modules()
    )
    tensors = tuple((n, tuple(p.shape), p.dtype) for n, p in module.named_parameters())
    if call is None:
        return inner, tensors
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    shapes = tuple(
        tuple(x.shape) if isinstance(x, Tensor) else (type(x), _fact(x, 0)) for x in leaves
    )
    return inner, tensors, shapes, str(spec)


def _facts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What of a module's attributes decides how it computes."""
    for name, value in vars(module).items():
        if name in _HOOKS:
            yield name, tuple(_fact(hook, 0) for hook in value.values())
        elif name not in _PLACES and name not in _OF_MODULES:
            fact = _fact(value, 0)
            if fact is not None:
                yield name, fact


_OF_MODULES = vars(nn.Module()).keys() - {"training"}


def _fact(value: Any, depth: int) -> Any:
    """A number, a text or a function as a value that can be compared; None for other objects."""
    if isinstance(value, int | float | str | bool | torch.dtype | enum.Enum | type):
        return value
    if isinstance(value, nn.Module | Tensor) or depth > _DEEPEST:
        return None
    if isinstance(value, FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        found = [_fact(x, depth + 1) for x in (*cells, *(value.__defaults__ or ()))]
        return value.__code__, tuple(found)
    if isinstance(value, MethodType):
        return _fact(value.__func__, depth + 1)
    if isinstance(value, BuiltinFunctionType):
        return value
    if isinstance(value, partial):
        given = (*value.args, *value.keywords.items())
        return tuple(_fact(x, depth + 1) for x in (value.func, *given))
    if isinstance(value, list | tuple):
        return tuple(_fact(x, depth + 1) for x in value)
    if isinstance(value, dict):
        return tuple((repr(k), _fact(x, depth + 1)) for k, x in value.items())
    return None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a name that is not bound yet
        return None
