"""The header of a GGUF file: its metadata, and where its tensors are. Nothing in it is believed.

The format is that of the GGUF specification, versions 2 and 3. The gguf package's own reader makes
several arrays for every token of the vocabulary, which takes seconds and more memory than many a
rank's weights, and it follows whatever lengths a file states; here every length is compared with
what is left of the file before it is used, and a list stays one piece of the file until it is asked
for.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from colrow.files import check_regular, shown

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_FIELDS, _TENSORS, _ITEMS = 10_000, 50_000, 1 << 22
_KEY_BYTES, _STRING_BYTES, _HEADER_BYTES = 1 << 16, 64 << 20, 256 << 20
_DIMS = 4
_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
_PLAIN = {
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.I8: np.int8,
    GGMLQuantizationType.I16: np.int16,
    GGMLQuantizationType.I32: np.int32,
    GGMLQuantizationType.I64: np.int64,
}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as the file holds it.

    Attributes:
        kind: how its numbers are stored.
        shape: in PyTorch's order; GGUF stores dimensions fastest first, which is the reverse.
        data: ``[numbers]`` for plain kinds, else ``[bytes]``; a part of the mapped file.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: npt.NDArray[Any]


@dataclass(frozen=True)
class _Field:
    """A value of the metadata: where it is, and what."""

    kind: GGUFValueType
    start: int
    stop: int
    item: GGUFValueType | None = None
    count: int = 0


class OtherByteOrderError(Exception):
    """The file is of the other byte order."""


class GGUFHeader:
    """The metadata and the tensors of a mapped file.

    Raises:
        ValueError: what the file states does not fit into it, or is more than a model can need.
        OtherByteOrderError: a file of the other byte order.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path)
        if not path.stat().st_size:
            raise ValueError("it is empty")
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._size, self._at = len(self._data), 0
        self._fields: dict[str, _Field] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        if self._take(4) != _MAGIC:
            raise ValueError("it does not start with the letters GGUF")
        (version,) = self._numbers("I")
        if version and not version & 0xFFFF:
            raise OtherByteOrderError
        if version not in _VERSIONS:
            raise ValueError(f"it has version {version} of the format; 2 and 3 can be read")
        tensors, fields = self._numbers("QQ")
        # A tensor's entry has at least 32 bytes, a field's 13.
        self._check_count(fields, _FIELDS, 13, "entries of metadata")
        self._check_count(tensors, _TENSORS, 32, "tensors")
        for _ in range(fields):
            self._read_field()
        self._read_tensors(tensors)

    def keys(self) -> list[str]:
        """The keys of the metadata."""
        return list(self._fields)

    def has(self, key: str) -> bool:
        """Whether the metadata has a key."""
        return key in self._fields

    def value(self, key: str) -> object:
        """The value of a key: a number, a truth value, a text, or a list of one of these."""
        field = self._fields[key]
        try:
            return self._value(field)
        except UnicodeDecodeError as error:
            raise ValueError(f"{shown(key)} is not UTF-8 text: {error.reason}") from None

    def _value(self, field: _Field) -> object:
        if field.kind == GGUFValueType.STRING:
            return self._text(field.start, field.stop)
        if field.kind != GGUFValueType.ARRAY:
            return struct.unpack_from("<" + _SCALARS[field.kind], self._data, field.start)[0]
        assert field.item is not None
        if field.item == GGUFValueType.STRING:
            return self._texts(field)
        code = f"<{field.count}{_SCALARS[field.item]}"
        return list(struct.unpack_from(code, self._data, field.start))

    def _texts(self, field: _Field) -> list[str]:
        found, at = [], field.start
        for _ in range(field.count):
            start = at + 8
            at = start + int.from_bytes(self._data[at:start], "little")
            found.append(self._text(start, at))
        return found

    def _text(self, start: int, stop: int) -> str:
        return self._data[start:stop].decode("utf-8")

    def _take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > self._size:
            raise ValueError(f"byte {start} and the {count} after it lie past the end of the file")
        return self._data[start : self._at]

    def _numbers(self, code: str) -> tuple[Any, ...]:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))

    def _check_count(self, count: int, most: int, least_bytes: int, what: str) -> None:
        if count > most or count * least_bytes > self._size - self._at:
            raise ValueError(
                f"it states {count} {what}, more than {'can be read' if count > most else 'fit in'}"
            )

    def _name(self, what: str) -> str:
        (length,) = self._numbers("Q")
        if length > _KEY_BYTES:
            raise ValueError(f"it states a name of {length} bytes for a {what}")
        return self._take(length).decode("utf-8")

    def _read_field(self) -> None:
        key = self._name("key of the metadata")
        if key in self._fields:
            raise ValueError(f"it has the key {shown(key)} twice")
        kind = self._kind(key)
        if kind == GGUFValueType.ARRAY:
            field = self._array(key)
        elif kind == GGUFValueType.STRING:
            (length,) = self._numbers("Q")
            field = self._field(key, kind, length)
        else:
            field = self._field(key, kind, struct.calcsize("<" + _SCALARS[kind]))
        self._fields[key] = field
        self._at = field.stop
        if self._at > _HEADER_BYTES:
            raise ValueError(f"its metadata has more than {_HEADER_BYTES} bytes")

    def _kind(self, key: str) -> GGUFValueType:
        (code,) = self._numbers("I")
        try:
            return GGUFValueType(code)
        except ValueError:
            raise ValueError(f"{shown(key)} is of an unknown type {code}") from None

    def _field(self, key: str, kind: GGUFValueType, length: int) -> _Field:
        if length > _STRING_BYTES or length > self._size - self._at:
            raise ValueError(
                f"{shown(key)} states a length of {length} bytes, and {self._size - self._at} are "
                "left of the file"
            )
        return _Field(kind, self._at, self._at + length)

    def _array(self, key: str) -> _Field:
        item = self._kind(key)
        if item == GGUFValueType.ARRAY:
            raise ValueError(f"{shown(key)} is a list of lists, which no model has")
        (count,) = self._numbers("Q")
        size = 8 if item == GGUFValueType.STRING else struct.calcsize("<" + _SCALARS[item])
        if count > _ITEMS or count * size > self._size - self._at:
            raise ValueError(f"{shown(key)} states {count} items, more than can be read")
        stop = self._at + count * size
        if item == GGUFValueType.STRING:
            stop, end, data = self._at, self._size - 8, self._data
            unpack = struct.Struct("<Q").unpack_from
            for _ in range(count):
                if stop > end:
                    raise ValueError(f"the texts of {shown(key)} run past the end of the file")
                stop += 8 + unpack(data, stop)[0]
            if stop > self._size:
                raise ValueError(f"the texts of {shown(key)} run past the end of the file")
        return _Field(GGUFValueType.ARRAY, self._at, stop, item, count)

    def _read_tensors(self, count: int) -> None:
        entries: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]] = []
        for _ in range(count):
            name = self._name("tensor")
            (dims,) = self._numbers("I")
            if dims > _DIMS:
                raise ValueError(f"tensor {shown(name)} states {dims} dimensions, at most {_DIMS}")
            shape = self._numbers(f"{dims}Q")
            code, offset = self._numbers("IQ")
            try:
                kind = GGMLQuantizationType(code)
            except ValueError:
                raise ValueError(f"tensor {shown(name)} is of an unknown type {code}") from None
            entries.append((name, kind, shape[::-1], offset))
        alignment = self._alignment()
        start = -(-self._at // alignment) * alignment
        places: list[tuple[int, int, str]] = []
        for name, kind, shape, offset in entries:
            if name in self.tensors:
                raise ValueError(f"it has the tensor {shown(name)} twice")
            length = self._length(name, kind, shape)
            first = start + offset
            if offset % alignment or first + length > self._size:
                raise ValueError(
                    f"tensor {shown(name)} of {length} bytes at {first} does not lie in the file "
                    f"of {self._size} bytes, or not at a multiple of {alignment}"
                )
            places.append((first, first + length, name))
            dtype = np.dtype(_PLAIN.get(kind, np.uint8))
            items = length // dtype.itemsize
            data = np.frombuffer(self._data, dtype, items, first if items else 0)
            self.tensors[name] = GGUFTensor(kind, shape, data)
        places.sort()
        for (_, stop, name), (first, last, other) in itertools.pairwise(places):
            if first < stop and first < last:
                raise ValueError(f"tensors {shown(name)} and {shown(other)} overlap")

    def _length(self, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor; its rows are whole blocks."""
        block, size = GGML_QUANT_SIZES[kind]
        count = math.prod(shape)
        if count >= 1 << 63 or (shape and shape[-1] % block):
            raise ValueError(
                f"tensor {shown(name)} states the shape {list(shape)}, which is too large or not "
                f"made of {kind.name}'s blocks of {block}"
            )
        return -(-count // block) * size

    def _alignment(self) -> int:
        field = self._fields.get("general.alignment")
        if field is None:
            return 32
        if field.kind != GGUFValueType.UINT32:
            raise ValueError(f"general.alignment is of type {field.kind.name}, not UINT32")
        value = self.value("general.alignment")
        if not isinstance(value, int) or value < 1 or value & (value - 1):
            raise ValueError(f"general.alignment is {value}, not a power of two")
        return value
