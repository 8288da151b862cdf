"""Whether embedding and head are one matrix: the configuration says it, and the file may differ.

A file may hold both, one, or two different ones. transformers' rule for a model that is tied by its
configuration is followed: two matrices that differ are both kept, and one alone serves for both,
under whichever name it comes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from colrow.checkpoint.naming import Naming
from colrow.checkpoint.reader import TensorReader
from colrow.models.config import ModelConfig

_ELEMENTS = 1 << 20
"""Compared at a time."""


def as_in_file(
    config: ModelConfig, naming: Naming, reader: TensorReader
) -> tuple[ModelConfig, Naming]:
    """The configuration untied where the file holds two different matrices, and where they are.

    Reads both matrices where a tied model's file has both, and sends nothing, so that every rank
    comes to the same answer.
    """
    if not config.tie_embeddings:
        return config, naming
    names = reader.names()
    prefix = missing_prefix(naming, names)
    embedding, head = (
        f"{naming.modules[module][0]}.weight".removeprefix(prefix)
        for module in ("embedding", "head")
    )
    if head not in names:
        return config, naming
    if embedding not in names:
        modules = {**naming.modules, "embedding": naming.modules["head"]}
        return config, replace(naming, modules=modules)
    if same_values(reader, embedding, head):
        return config, naming
    return replace(config, tie_embeddings=False), naming


def missing_prefix(naming: Naming, names: Collection[str]) -> str:
    """Checkpoints of a bare model lack the leading ``model.`` or ``transformer.``; returns it."""
    norm = f"{naming.modules['norm'][0]}.weight"
    prefix, _, rest = norm.partition(".")
    return f"{prefix}." if norm not in names and rest in names else ""


def same_values(reader: TensorReader, first: str, second: str) -> bool:
    """Whether two matrices of a file are equal, read a few rows at a time, in fp64."""
    shape = reader.shape(first)
    if reader.shape(second) != shape:
        return False
    rows = max(1, _ELEMENTS // max(1, shape[-1]))
    for start in range(0, shape[0], rows):
        part = ((start, min(start + rows, shape[0])),)
        left, right = (reader.read(n, part, dtype=torch.float64) for n in (first, second))
        if not torch.equal(left, right):
            return False
    return True
