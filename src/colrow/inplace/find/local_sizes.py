"""Local sizes: the numbers of heads and widths that a module's forward reads, for a rank's part."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor, nn

_LIMIT = 512
_MOST_NUMBERS = 9


@dataclass(frozen=True)
class ReadNumber:
    """An integer, or a sequence of them, that a forward reads.

    Attributes:
        name: the attribute's name.
        value: what it is in the whole model.
        owners: where: name of the module, and the name of its attribute that is a configuration
            which has the number ("" when the module has it).
    """

    name: str
    value: Any
    owners: tuple[tuple[str, str], ...]


LocalSizes = dict[ReadNumber, Any]
"""Numbers and what they should be on a rank."""


def _is_config(value: Any) -> bool:
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, Tensor | nn.Module | type)
        and type(value).__name__.endswith(("Config", "Args", "Arguments", "Configuration"))
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_number(x) and isinstance(x, int) for x in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@contextmanager
def _recording(target: Any, note: Any) -> Iterator[None]:
    cls: Any = type(target)

    def __getattribute__(self: Any, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        note(name, value)
        return value

    watched = type(cls.__name__, (cls,), {"__getattribute__": __getattribute__})
    try:
        target.__class__ = watched
    except TypeError:
        yield
        return
    try:
        yield
    finally:
        target.__class__ = cls


@contextmanager
def numbers_read(module: nn.Module, skipped: set[str]) -> Iterator[list[ReadNumber]]:
    """Inside it, collects the numbers that modules and their configurations are asked for.

    Args:
        skipped: modules inside ``module`` that do not count.
    """
    seen: dict[tuple[str, Any], dict[tuple[str, str], None]] = {}
    found: list[ReadNumber] = []

    def noting(owners: list[tuple[str, str]]) -> Any:
        def note(name: str, value: Any) -> None:
            if not name.startswith("_") and _is_number(value):
                key = (name, tuple(value) if isinstance(value, list) else value)
                seen.setdefault(key, {}).update(dict.fromkeys(owners))

        return note

    targets: dict[int, tuple[Any, list[tuple[str, str]]]] = {}
    for path, inner in module.named_modules():
        if path in skipped:
            continue
        targets[id(inner)] = (inner, [(path, "")])
        for name, value in vars(inner).items():
            if not name.startswith("_") and _is_config(value):
                targets.setdefault(id(value), (value, []))[1].append((path, name))
    stack = [_recording(target, noting(owners)) for target, owners in targets.values()]
    try:
        for manager in stack:
            manager.__enter__()
        yield found
    finally:
        for manager in reversed(stack):
            manager.__exit__(None, None, None)
        for (name, value), owners in seen.items():
            found.append(ReadNumber(name, value, tuple(owners)))


def local_view(config: Any, changed: Mapping[str, Any]) -> Any:
    """``config`` with some attributes changed; everything else is read from it at each access."""
    cls: Any = type(config)

    def __getattribute__(self: Any, name: str) -> Any:
        if name in changed:
            return changed[name]
        if name == "__deepcopy__":
            return lambda memo: local_view(copy.deepcopy(config, memo), changed)
        return getattr(config, name)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        setattr(config, name, value)

    body = {"__getattribute__": __getattribute__, "__setattr__": __setattr__}
    return cls.__new__(type(cls.__name__, (cls,), body))


@contextmanager
def with_sizes(module: nn.Module, local_sizes: LocalSizes) -> Iterator[None]:
    """The module with a rank's numbers, for a while."""
    undo = set_sizes(module, local_sizes)
    try:
        yield
    finally:
        for target, name, value in reversed(undo):
            target.__dict__[name] = value


def set_sizes(module: nn.Module, local_sizes: LocalSizes) -> list[tuple[nn.Module, str, Any]]:
    """Gives the module a rank's numbers; returns modules, attributes and what these were before."""
    undo: list[tuple[nn.Module, str, Any]] = []
    views: dict[tuple[str, str], dict[str, Any]] = {}
    for number, value in local_sizes.items():
        for path, config in number.owners:
            if config:
                views.setdefault((path, config), {})[number.name] = value
                continue
            target = module.get_submodule(path)
            if number.name in vars(target):
                undo.append((target, number.name, vars(target)[number.name]))
                whole = vars(target)[number.name]
                target.__dict__[number.name] = list(value) if isinstance(whole, list) else value
    for (path, config), changed in views.items():
        target = module.get_submodule(path)
        whole = vars(target)[config]
        undo.append((target, config, whole))
        target.__dict__[config] = local_view(whole, changed)
    return undo


def candidate_sizes(numbers: list[ReadNumber], sizes: set[tuple[int, int]]) -> Iterator[LocalSizes]:
    """What the numbers might be on a rank, the likeliest first.

    Args:
        sizes: pairs of (local, global) lengths of the dimensions that are split.
    """
    options: list[tuple[ReadNumber, list[Any]]] = []
    for number in numbers:
        changed = _scaled(number.value, sizes)
        if changed:
            options.append((number, [*changed, number.value]))
    all_changed, unchanged = [0] * len(options), [len(values) - 1 for _, values in options]
    choices: list[Sequence[int]] = [all_changed, unchanged]
    if len(options) <= _MOST_NUMBERS:
        mixed = product(*(range(len(values)) for _, values in options))
        choices += sorted(
            mixed, key=lambda c: sum(i == last for i, last in zip(c, unchanged, strict=True))
        )
    for choice in choices[:_LIMIT]:
        yield {
            number: values[i]
            for i, (number, values) in zip(choice, options, strict=True)
            if i < len(values) - 1
        }


def _scaled(value: Any, sizes: set[tuple[int, int]]) -> list[Any]:
    found: list[Any] = []
    ratios = sorted(sizes, key=lambda pair: pair[0] / pair[1])
    for local, whole in ratios:
        if isinstance(value, tuple | list):
            parts = [x * local // whole if x * local % whole == 0 else x for x in value]
            scaled: Any = type(value)(parts)
        elif value * local % whole == 0:
            scaled = value * local // whole
        else:
            continue
        if scaled != value and scaled not in found and scaled != 0:
            found.append(scaled)
    return found
