"""The weights of a model that is split in place, read from files; a rank reads what it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from operator import setitem
from pathlib import Path

import torch
from torch import Tensor, nn

from colrow.checkpoint.locate import resolve_model_path
from colrow.checkpoint.opening import open_reader
from colrow.checkpoint.reader import Ranges, TensorReader, row_chunks
from colrow.inplace.apply.parameters import note_replaced
from colrow.inplace.apply.record import record_of
from colrow.inplace.observe.calls import full_name
from colrow.inplace.weights.file_names import FileNames, file_names, whole_shape
from colrow.inplace.weights.sources import Source
from colrow.partition import ShardSpec

_ELEMENTS = 1 << 20
"""Compared at a time."""


def load_weights(
    model: nn.Module, path: str | Path, *, device: torch.device | str | None = None
) -> nn.Module:
    """Fills a parallelised model from a checkpoint; each rank reads only its own slices.

    Parameters on the meta device are allocated first. Tensors that transformers stores under other
    names or in other shapes than its models hold them are converted as its own table says.

    Args:
        path: a directory with safetensors (in one file or sharded), a safetensors file, or a hub
            id that is in the local cache.
        device: where to allocate parameters; the CPU by default.

    Returns:
        The same model.

    Raises:
        ValueError: nothing there, tensors that are missing, left over or mis-shaped, a form that
            cannot be read part by part, or different values for parameters that are tied in a model
            that is not transformers'.

    Sends nothing. Needs little more memory than the rank's part.
    """
    with open_weights(path) as reader:
        found = checked_names(model, reader)
        fill(model, found, reader, torch.device(device or "cpu"))
    return model


def open_weights(path: str | Path) -> TensorReader:
    """Opens a checkpoint of safetensors.

    Raises:
        ValueError: when there is none, or it is a GGUF file.
    """
    file = resolve_model_path(path)
    if file.suffix == ".gguf":
        raise ValueError(
            f"{file} has llama.cpp's names and layouts, which only colrow.from_pretrained reads; "
            "write a directory from it first: colrow convert FILE DIRECTORY --to hf"
        )
    return open_reader(file)


def checked_names(model: nn.Module, reader: TensorReader) -> FileNames:
    """Which tensors of the checkpoint each of the model's is made of.

    A head that a model of transformers ties to its embedding, and of which the file has other
    values, gets a parameter of its own while the model is on the meta device, as in transformers.

    Raises:
        ValueError: when one is missing, left over, or of another shape.
    """
    found = file_names(model, reader)
    _untie(model, found, reader)
    missing = [
        names[0]
        for names, _ in tied_parameters(model)
        if not any(n in found.sources for n in names)
    ]
    if missing:
        raise ValueError(f"{reader.description} lacks {_some(missing)} of {type(model).__name__}")
    if found.extra:
        raise ValueError(
            f"{reader.description} has {_some(found.extra)}, for which {type(model).__name__} has "
            "no place; the file and the model do not belong together"
        )
    for name, source in found.sources.items():
        if source.shape != (shape := whole_shape(model, name)):
            raise ValueError(
                f"{name} in {reader.description} has shape {source.shape}, but the model's is "
                f"{shape}"
            )
    return found


def _untie(model: nn.Module, found: FileNames, reader: TensorReader) -> None:
    """Takes apart what is tied in the model and has different values in the file."""
    for names, parameter in tied_parameters(model):
        first, *others = [n for n in names if n in found.sources] or [""]
        differ = [n for n in others if not _same_values(found.sources[first], found.sources[n])]
        config = getattr(model, "config", None)
        empty = parameter.is_meta and record_of(model) is None
        if differ and not (empty and getattr(config, "tie_word_embeddings", False)):
            raise ValueError(
                f"{' and '.join(names)} are one parameter in {type(model).__name__}, but "
                f"{reader.description} has different values for them: build the model with a "
                "parameter for each (tie_word_embeddings=False)"
            )
        for name in differ:
            path, _, last = name.rpartition(".")
            own = nn.Parameter(torch.empty_like(parameter), parameter.requires_grad)
            model.get_submodule(path)._parameters[last] = own
            config.tie_word_embeddings = False  # type: ignore[union-attr]
            getattr(model, "all_tied_weights_keys", {}).pop(name, None)


def _same_values(first: Source, second: Source) -> bool:
    """Whether two sources are equal, read a few rows at a time, in fp64."""
    if first.shape != second.shape:
        return False
    whole: list[Ranges] = [((0, length),) for length in first.shape]
    rows = max(1, _ELEMENTS // max(1, math.prod(first.shape[1:])))
    for start in range(0, first.shape[0] if first.shape else 1, rows):
        part = [((start, min(start + rows, first.shape[0])),), *whole[1:]] if whole else []
        left, right = (source.read(part, torch.float64) for source in (first, second))
        if not torch.equal(left, right):
            return False
    return True


def tied_parameters(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Every parameter with all its names."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(found.values())


@torch.no_grad()
def fill(model: nn.Module, found: FileNames, reader: TensorReader, device: torch.device) -> None:
    """Copies this rank's part of every parameter into the model."""
    record = record_of(model)
    specs = record.specs if record is not None else {}
    rank = record.tp.rank if record is not None else 0
    allocate(model, lambda _, like: torch.empty_like(like, device=device))
    for names, parameter in tied_parameters(model):
        first = next(found.sources[n] for n in names if n in found.sources)
        spec = specs.get(names[0])
        for place, chunk in chunks(first, parameter, spec, rank):
            place.copy_(chunk)


def chunks(
    source: Source, parameter: Tensor, spec: ShardSpec | None, rank: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """A few rows of a rank's part at a time: where they belong, and their values."""
    part: list[Ranges] = [((0, length),) for length in source.shape]
    if spec is not None and spec.dim is not None:
        part[spec.dim] = tuple(spec.global_ranges(rank))
    if not part:
        yield parameter, source.read((), parameter.dtype)
        return
    for place, rows in row_chunks(parameter, part[0]):
        yield place, source.read([rows, *part[1:]], parameter.dtype)


def allocate(
    model: nn.Module, value: Callable[[str, nn.Parameter], Tensor]
) -> list[Callable[[], None]]:
    """Gives parameters on the meta device a value, by their first name; returns what undoes it."""
    made: dict[int, nn.Parameter] = {}
    undo: list[Callable[[], None]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                values = value(full_name(path, name), parameter)
                made[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
                undo.append(note_replaced(parameter))
            module._parameters[name] = made[id(parameter)]
            undo.append(partial(setitem, module._parameters, name, parameter))
    return undo


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
