"""Reading slices of safetensors: one file, or shards and their index."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import EllipsisType
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from colrow.checkpoint.locate import damaged_file
from colrow.checkpoint.reader import (
    Ranges,
    TensorReader,
    check_conversion,
    placements,
    select,
    selected_length,
    unknown_tensor,
    unsupported_type,
)
from colrow.files import INDEX_BYTES, check_regular, member, parse_json, read_bytes

_FLOATS = ("F64", "F32", "F16", "BF16")
_HEADER_BYTES = 16 << 20  # a tensor takes about a hundred
_SUPPORTED = (*_FLOATS, "I64", "I32", "I16", "I8", "U8", "BOOL")
_CHUNK_ELEMENTS = 1 << 20
"""Compared at a time."""


class _StoredTensor(Protocol):
    """What ``safe_open(...).get_slice`` returns: indexing maps only the indexed bytes."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: tuple[slice, ...] | EllipsisType) -> torch.Tensor: ...


class _OpenFile(Protocol):
    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _StoredTensor: ...
    def __exit__(self, kind: None, error: None, trace: None) -> None: ...


class SafetensorsReader(TensorReader):
    """A ``TensorReader`` over one safetensors file or over the shards that an index lists.

    The files are memory-mapped: a slice is a strided view of the mapping, copied and converted
    straight into the result. With an index, the tensors are those of all shards that it names, also
    those that it does not list.

    Raises:
        ValueError: a damaged file or index, a shard that the index names and that is missing, a
            tensor that the index places in a shard that lacks it, or one that two shards hold with
            different values. All are found on opening.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: list[_OpenFile] = []
        self._home: dict[str, _OpenFile] = {}
        try:
            if path.suffix == ".json":
                self._open_shards()
            else:
                file = self._open(path)
                self._home = dict.fromkeys(file.keys(), file)
        except ValueError:
            self.close()
            raise

    @property
    def description(self) -> str:
        """Path and format, for messages."""
        shards = f", {len(self._files)} shards" if self._path.suffix == ".json" else ""
        return f"{self._path} (safetensors{shards})"

    def names(self) -> frozenset[str]:
        """The names of all tensors, as the file spells them."""
        return frozenset(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape. Raises ``ValueError`` for an unknown name."""
        return tuple(self._stored(name).get_shape())

    def read(
        self,
        name: str,
        rows: Ranges | None = None,
        columns: Ranges | None = None,
        *,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Read these rows and columns, see ``TensorReader.read``."""
        stored = self._stored(name)
        stored_dtype = stored.get_dtype()
        if stored_dtype not in _SUPPORTED:
            raise unsupported_type(name, stored_dtype, _SUPPORTED, self.description)
        check_conversion(name, stored_dtype, stored_dtype in _FLOATS, dtype)
        shape = tuple(stored.get_shape())
        selected = select(name, shape, rows, columns)
        sliced = tuple(map(selected_length, selected))
        result = torch.empty(sliced + shape[len(sliced) :], dtype=dtype, device="cpu")
        for pairs in itertools.product(*map(placements, selected)):
            source = tuple(pair[0] for pair in pairs)
            target = tuple(pair[1] for pair in pairs)
            with torch.device("cpu"):  # safetensors' own tensors go where torch's default is
                part = stored[source]
            result[target].copy_(part)
        return result

    def close(self) -> None:
        """Release the files. Tensors already read stay valid."""
        for file in self._files:
            file.__exit__(None, None, None)
        self._files = []
        self._home = {}

    def _stored(self, name: str) -> _StoredTensor:
        if not self._files:
            raise ValueError(f"{self.description} was closed; open it again to read {name!r}")
        if name not in self._home:
            raise unknown_tensor(name, self._home, self.description)
        return self._home[name].get_slice(name)

    def _open(self, path: Path) -> _OpenFile:
        check_regular(path)
        with path.open("rb") as header:
            length = int.from_bytes(header.read(8), "little")
        if length > _HEADER_BYTES:
            cause = f"it states a header of {length} bytes, at most {_HEADER_BYTES} are read"
            raise damaged_file(path, "safetensors", cause)
        try:
            opened = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as cause:
            raise damaged_file(path, "safetensors", cause) from cause
        file = cast(_OpenFile, opened)
        self._files.append(file)
        return file

    def _open_shards(self) -> None:
        shard_of = _read_index(self._path)
        shards: dict[str, _OpenFile] = {}
        for shard in sorted(set(shard_of.values())):
            try:
                path = member(self._path.parent, shard, self._path)
            except FileNotFoundError:
                raise ValueError(
                    f"{self._path} names the shard {shard}, which is missing from "
                    f"{self._path.parent}; copy or download it again"
                ) from None
            shards[shard] = self._open(path)
        held = {shard: frozenset(file.keys()) for shard, file in shards.items()}
        for name, shard in shard_of.items():
            if name not in held[shard]:
                raise ValueError(
                    f"{self._path} places tensor {name!r} in {shard}, which does not hold it; "
                    "the index and the shards are of different checkpoints"
                )
            self._home[name] = shards[shard]
        self._add_unlisted(shards)

    def _add_unlisted(self, shards: dict[str, _OpenFile]) -> None:
        """Tensors that the index does not list where they are, or not at all."""
        shard_of = {id(file): shard for shard, file in shards.items()}
        for shard, file in shards.items():
            for name in list(file.keys()):
                home = self._home.setdefault(name, file)
                if home is not file and not _equal(home.get_slice(name), file.get_slice(name)):
                    raise ValueError(
                        f"tensor {name!r} is in {shard_of[id(home)]} and in {shard} of "
                        f"{self._path.parent}, with different values; download the files again, or "
                        "delete those that belong to another checkpoint"
                    )


def _equal(first: _StoredTensor, second: _StoredTensor) -> bool:
    """Whether two stored tensors are the same, read a few rows at a time."""
    shape = first.get_shape()
    if (shape, first.get_dtype()) != (second.get_shape(), second.get_dtype()):
        return False
    if not shape:
        return torch.equal(first[...], second[...])
    rows = max(1, _CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
    parts = ((slice(start, start + rows),) for start in range(0, shape[0], rows))
    return all(torch.equal(first[part], second[part]) for part in parts)


def _read_index(path: Path) -> dict[str, str]:
    """The shard file of every tensor."""
    content = read_bytes(path, INDEX_BYTES)
    try:
        index = parse_json(content.decode("utf-8"))
    except ValueError as cause:
        raise damaged_file(path, "JSON", cause) from cause
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(v, str) for v in shard_of.values()):
        raise ValueError(f"{path} has no 'weight_map' from tensor names to shard files")
    return shard_of
