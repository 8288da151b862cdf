"""Modules that compute the same, so that one of them is looked at for all."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colrow.inplace.calls import ModuleCall

# Numbers of a layer that say where it is and not what it does.
_PLACES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "idx"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEEPEST = 4


def kind_of(module: nn.Module, call: ModuleCall | None) -> Any:
    """Equal for modules that compute the same from arguments of the same shapes."""
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
