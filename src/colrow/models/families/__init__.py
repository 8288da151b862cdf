"""Every family that the decoder knows: one file each, which holds all that is known of it.

To add one, see docs/adding_a_family.md.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from colrow.files import shown
from colrow.models.families.family import Family


@cache
def families() -> dict[str, Family]:
    """All of them by name: each module of this package that has a ``FAMILY``."""
    modules = (
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
    )
    return {module.FAMILY.name: module.FAMILY for module in modules if hasattr(module, "FAMILY")}


def family_named(name: str) -> Family:
    """The family of this ``model_type``.

    Raises:
        ValueError: for an unknown one, naming those that are known.
    """
    if name not in families():
        raise ValueError(
            f"unknown architecture {shown(name)}: the decoder knows {', '.join(sorted(families()))}"
        )
    return families()[name]
