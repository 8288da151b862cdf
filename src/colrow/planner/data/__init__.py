"""Published measurements, as tables; every row names its source."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from pathlib import Path


@cache
def read_table(name: str, folder: Path | None = None) -> tuple[dict[str, str], ...]:
    """The rows of ``<name>.csv``, each a mapping of column to text; by default of this package."""
    file = (folder or resources.files(__package__)).joinpath(f"{name}.csv")
    return tuple(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
