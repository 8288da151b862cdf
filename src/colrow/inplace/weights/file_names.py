"""Which tensors of a checkpoint make up each parameter of a model.

A model of one's own has the names of its state dict. A model of transformers may have other names
and shapes than its files (experts in one tensor, renamed layers); transformers' own table of
conversions says how the ones become the others, and is followed here on descriptions of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from colrow.checkpoint.reader import TensorReader
from colrow.inplace.apply.record import record_of
from colrow.inplace.weights.sources import Cut, Joined, Source, Stacked, Stored, Swapped

# Buffers that older checkpoints carry; the models compute what they hold.
_COMPUTED = r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.masked_bias$"


@dataclass
class FileNames:
    """Which tensors of a checkpoint a model's are made of.

    Attributes:
        sources: by name in the model's state dict.
        extra: tensors of the file that the model has no place for.
    """

    sources: dict[str, Source] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)


def file_names(model: nn.Module, reader: TensorReader) -> FileNames:
    """The sources of a model's parameters and buffers.

    Raises:
        ValueError: when the checkpoint's form needs a conversion that is not known here.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if hasattr(model, "base_model_prefix") and hasattr(model, "config"):
        found = _converted(model, reader, known)
    else:
        found = FileNames()
        for name in sorted(reader.names()):
            if name in known:
                found.sources[name] = Stored(reader, name)
            else:
                found.extra.append(name)
    patterns = [_COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    found.extra = [n for n in found.extra if not any(re.search(p, n) for p in patterns)]
    return found


def _converted(model: Any, reader: TensorReader, known: set[str]) -> FileNames:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise ValueError(
            "reading a model of transformers part by part needs transformers 5 or later: "
            "pip install 'colrow[models]'"
        ) from error
    table = get_model_conversion_mapping(model)
    renamings = [t for t in table if isinstance(t, WeightRenaming)]
    converters = [t for t in table if isinstance(t, WeightConverter)]
    of_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    prefix, state = model.base_model_prefix, dict.fromkeys(known, True)
    found = FileNames()
    collected: dict[str, tuple[Any, dict[str, list[Source]]]] = {}
    for name in sorted(reader.names(), key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is not None:
            converter, tensors = collected.setdefault(target, (of_pattern[pattern], {}))
            tensors.setdefault(pattern, []).append(Stored(reader, name))
        elif target in known:
            found.sources[target] = Stored(reader, name)
        else:
            found.extra.append(name)
    for target, (converter, tensors) in collected.items():
        for name, source in _apply(converter, tensors, target, model).items():
            if name in known:
                found.sources[name] = source
            else:
                found.extra.append(name)
    return found


def _apply(
    converter: Any, tensors: Mapping[str, list[Source]], target: str, model: Any
) -> dict[str, Source]:
    """The tensors that a conversion makes, under their names in the model."""
    patterns, targets = converter.source_patterns, converter.target_patterns
    now: dict[str, list[Source]] = {p: tensors[p] for p in patterns if p in tensors}
    try:
        for operation in converter.operations:
            now = _operate(operation, now, targets, target, model)
    except _UnknownError as unknown:
        raise ValueError(
            f"{target} is stored in a form that transformers converts with {unknown}, which cannot "
            "be followed part by part; load the model with transformers, save it with "
            "save_pretrained(DIRECTORY, save_original_format=False), and read that"
        ) from None
    made = {}
    for pattern, sources in now.items():
        name = target if pattern in target else target.replace(targets[0], pattern)
        made[name] = sources[0]
    return made


class _UnknownError(Exception):
    """A conversion that is not known here."""


def _operate(
    operation: Any, now: dict[str, list[Source]], targets: list[str], target: str, model: Any
) -> dict[str, list[Source]]:
    kind = type(operation).__name__
    only = next(iter(now.values()))
    if kind == "MergeModulelist" and operation.dim == 0:
        merged: dict[str, list[Source]] = {p: [Stacked(tuple(s))] for p, s in now.items()}
        return {targets[0]: merged.popitem()[1]} if len(merged) == 1 else merged
    if kind == "Concatenate":
        parts = tuple(source for sources in now.values() for source in sources)
        return {targets[0]: [Joined(parts, operation.dim % len(parts[0].shape))]}
    if kind == "Chunk" and operation.num_shards_attribute is None and len(now) == 1:
        length = only[0].shape[operation.dim]
        size = -(-length // len(targets))
        bounds = [(i * size, min(length, (i + 1) * size)) for i in range(len(targets))]
        return {
            name: [Cut(only[0], operation.dim, start, stop)]
            for name, (start, stop) in zip(targets, bounds, strict=True)
        }
    if kind == "Transpose" and len(now) == 1 and len(targets) == 1:
        if operation.check_dims and only[0].shape == whole_shape(model, target):
            return {targets[0]: [only[0]]}
        dims = len(only[0].shape)
        return {targets[0]: [Swapped(only[0], operation.dim0 % dims, operation.dim1 % dims)]}
    raise _UnknownError(kind)


def whole_shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a parameter or buffer of a model, before it was split."""
    record = record_of(model)
    if record is not None and name in record.specs:
        return tuple(record.specs[name].shape)
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    tensor: Tensor | None = owner._parameters.get(last)
    tensor = owner._buffers[last] if tensor is None else tensor
    assert tensor is not None
    return tuple(tensor.shape)
