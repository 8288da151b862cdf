"""Names that a package offers without importing their modules before they are used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence


def lazy_exports(package: str, exports: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """A module-level ``__getattr__`` (PEP 562) for ``package``.

    Args:
        package: ``__name__`` of the package.
        exports: module to the names that it defines.
    """
    modules = {name: module for module, names in exports.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return __getattr__
