"""Names that a package offers without importing their modules before they are used."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # typing's, whose import takes as long as everything else here
if TYPE_CHECKING:
    from collections.abc import Callable


def lazy_exports(
    package: str, file: str
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562), with ``__all__`` behind the first.

    What the package offers is read from its own source: the lines ``from module import name as
    name``, the form in which type checkers take a name for exported. They stand where only type
    checkers go.

    Args:
        package: ``__name__`` of the package.
        file: its ``__file__``.
    """
    with open(file, encoding="utf-8") as source:
        lines = [line.split() for line in source]
    # from <module> import <name> as <name>
    modules = {words[3]: words[1] for words in lines if words[::2] == ["from", "import", "as"]}

    def __getattr__(name: str) -> object:
        if name == "__all__":
            return sorted([*modules, "__version__"])
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    def __dir__() -> list[str]:
        return sorted([*modules, *vars(importlib.import_module(package))])

    return __getattr__, __dir__
