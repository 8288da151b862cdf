"""Reading slices of GGUF files: only the quantisation blocks that cover them are decoded."""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.gguf_reader import ReaderField, ReaderTensor
from gguf.quants import dequantize

from colrow.checkpoint.locate import damaged_file
from colrow.checkpoint.reader import (
    Ranges,
    check_conversion,
    placements,
    select,
    selected_length,
    unknown_tensor,
    unsupported_type,
)

_FLOATS = ("F64", "F32", "F16")
_INTEGERS = ("I64", "I32", "I16", "I8")
_CHUNK_ELEMENTS = 1 << 17
"""Elements decoded at a time: large enough for speed, small enough to stay in the cache."""


class GGUFTensorReader:
    """A ``TensorReader`` over one GGUF file, which also gives its key/value metadata.

    The file is memory-mapped. Quantised blocks run along the last dimension and each stands
    alone, so a column range decodes the blocks that cover it and crops, ``_CHUNK_ELEMENTS`` at a
    time. Decoded values are those of ``gguf.quants.dequantize`` (float32), then ``dtype``.

    Raises:
        ValueError: a damaged file, one of the other byte order, or one part of a split model.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fields: dict[str, ReaderField] = {}
        self._tensors: dict[str, ReaderTensor] = {}
        self._closed = False
        try:
            file = _LazyReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, struct.error) as cause:
            raise damaged_file(path, "GGUF", cause, "or upgrade the gguf package") from cause
        if file.byte_order != "I":
            raise ValueError(f"{path} is a GGUF file of the other byte order; convert it first")
        self._fields = {k: v for k, v in file.fields.items() if not k.startswith("GGUF.")}
        self._tensors = {tensor.name: tensor for tensor in file.tensors}
        parts = self.metadata_value("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise ValueError(
                f"{path} is one of {parts} parts of a split model; merge them first: "
                "llama-gguf-split --merge FIRST_PART MERGED"
            )

    @property
    def description(self) -> str:
        """Path and format, for messages."""
        return f"{self._path} (GGUF)"

    def names(self) -> frozenset[str]:
        """The names of all tensors, as the file spells them."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape in PyTorch's order, [out_features, in_features].

        GGUF stores dimensions fastest first, which is the reverse. Raises ``ValueError`` for an
        unknown name.
        """
        return tuple(int(n) for n in reversed(self._tensor(name).shape))

    def read(
        self,
        name: str,
        rows: Ranges | None = None,
        columns: Ranges | None = None,
        *,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Read these rows and columns, see ``TensorReader.read``."""
        tensor = self._tensor(name)
        kind = tensor.tensor_type
        if not _can_decode(kind):
            supported = [k.name for k in GGMLQuantizationType if _can_decode(k)]
            raise unsupported_type(name, kind.name, supported, self.description)
        check_conversion(name, kind.name, kind.name not in _INTEGERS, dtype)
        shape = self.shape(name)
        selected = select(name, shape, rows, columns)
        sliced = tuple(map(selected_length, selected))
        result = torch.empty(sliced + shape[len(sliced) :], dtype=dtype, device="cpu")
        if result.numel():
            grid_rows, grid_columns = _as_grid(shape, selected)
            stored = tensor.data.reshape(shape[0] if len(shape) > 1 else 1, -1)
            grid = result.view(selected_length(grid_rows), -1)
            _fill(grid, stored, kind, grid_rows, grid_columns)
        return result

    def metadata(self) -> dict[str, object]:
        """Every key/value field: scalars, strings, and lists of them.

        Decodes the whole vocabulary; ``metadata_value`` decodes one field only.
        """
        return {key: _decode_field(field) for key, field in self._fields.items()}

    def metadata_value(self, key: str, default: object = None) -> object:
        """One key/value field, or ``default`` where the file does not have it."""
        return _decode_field(self._fields[key]) if key in self._fields else default

    def close(self) -> None:
        """Release the file. Tensors already read stay valid."""
        self._fields = {}
        self._tensors = {}
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tensor(self, name: str) -> ReaderTensor:
        if self._closed:
            raise ValueError(f"{self.description} was closed; open it again to read {name!r}")
        if name not in self._tensors:
            raise unknown_tensor(name, self._tensors, self.description)
        return self._tensors[name]


def _as_grid(shape: tuple[int, ...], selected: tuple[Ranges, ...]) -> tuple[Ranges, Ranges]:
    """The selection in the tensor seen as a matrix whose rows are whole runs of blocks.

    [n] is [1, n]; [a, b, c] is [a, b * c], so that column ranges scale by c.
    """
    if len(shape) < 2:
        return ((0, 1),), selected[0] if selected else ((0, 1),)
    inner = 1
    for length in shape[2:]:
        inner *= length
    return selected[0], tuple((start * inner, stop * inner) for start, stop in selected[1])


def _fill(
    result: torch.Tensor,
    stored: npt.NDArray[Any],
    kind: GGMLQuantizationType,
    rows: Ranges,
    columns: Ranges,
) -> None:
    """Decode the selected rows and columns of ``stored`` [rows, units] into ``result``.

    A unit is one number for the plain types and one byte for the others.
    """
    block, units = _block(kind)
    for (from_rows, to_rows), (from_columns, to_columns) in itertools.product(
        placements(rows), placements(columns)
    ):
        for row, column in _chunks(from_rows, from_columns, block):
            first = column.start // block
            last = -(-column.stop // block)
            height = row.stop - row.start
            # A copy: the mapping is read-only, and its pages need not stay.
            raw = np.array(stored[row, first * units : last * units])
            values = _decode(raw, kind).view(height, -1)  # [height, (last - first) * block]
            result[_move(row, from_rows, to_rows), _move(column, from_columns, to_columns)].copy_(
                values[:, column.start - first * block : column.stop - first * block]
            )


def _chunks(rows: slice, columns: slice, block: int) -> Iterator[tuple[slice, slice]]:
    """Cut a rectangle into pieces whose blocks hold about ``_CHUNK_ELEMENTS``, cropped or not."""
    for start in range(columns.start, columns.stop, _CHUNK_ELEMENTS):
        column = slice(start, min(start + _CHUNK_ELEMENTS, columns.stop))
        covered = (-(-column.stop // block) - column.start // block) * block
        height = max(1, _CHUNK_ELEMENTS // covered)
        for top in range(rows.start, rows.stop, height):
            yield slice(top, min(top + height, rows.stop)), column


def _move(part: slice, source: slice, target: slice) -> slice:
    """Where a part of ``source`` lies in ``target``."""
    shift = target.start - source.start
    return slice(part.start + shift, part.stop + shift)


def _block(kind: GGMLQuantizationType) -> tuple[int, int]:
    """Elements in a block, and array items that store it."""
    return (1, 1) if kind.name in _FLOATS + _INTEGERS else GGML_QUANT_SIZES[kind]


def _decode(raw: npt.NDArray[Any], kind: GGMLQuantizationType) -> torch.Tensor:
    """The numbers in some whole blocks, in order; float32 unless the type is a plain one."""
    if kind.name in _FLOATS + _INTEGERS:
        return torch.from_numpy(raw)
    if kind.name == "BF16":
        return torch.from_numpy(raw).view(torch.bfloat16)
    # One long row: the library then decodes all of it at once, not sixteen rows at a time.
    return torch.from_numpy(dequantize(raw.reshape(1, -1), kind))


@functools.cache
def _can_decode(kind: GGMLQuantizationType) -> bool:
    """Whether the installed gguf package decodes this type, found by decoding one empty block."""
    block, units = _block(kind)
    if (block, units) == (1, 1):
        return True
    try:
        _decode(np.zeros((1, units), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class _LazyReader(GGUFReader):
    """``GGUFReader`` that keeps a metadata list as one piece of the file.

    The base class makes several arrays for every token of the vocabulary, which takes seconds
    and more memory than many a rank's weights.
    """

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        item_code, count = struct.unpack_from("<IQ", self.data.data, orig_offs)
        item = GGUFValueType(item_code)
        start = orig_offs + 12
        numbers = self.gguf_scalar_to_np.get(item)
        if numbers is not None:
            payload = self._get(start, numbers, count)
            if len(payload) != count:
                raise ValueError(f"a list of {count} numbers runs past the end of the file")
            return 12 + payload.nbytes, [payload], [0], [GGUFValueType.ARRAY, item]
        if item != GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        stop = start
        view = self.data.data
        for _ in range(count):
            stop += 8 + struct.unpack_from("<Q", view, stop)[0]
        payload = self._get(start, np.uint8, stop - start)
        # No data index: the marker by which _decode_field knows undivided strings.
        return 12 + stop - start, [payload], [], [GGUFValueType.ARRAY, item]


def _decode_field(field: ReaderField) -> object:
    if field.types == [GGUFValueType.ARRAY, GGUFValueType.STRING] and not field.data:
        return _decode_strings(field.parts[-1].tobytes())
    return field.contents()


def _decode_strings(payload: bytes) -> list[str]:
    """Strings that each follow their length in bytes, a little-endian 64-bit number."""
    strings: list[str] = []
    position = 0
    while position < len(payload):
        start = position + 8
        position = start + int.from_bytes(payload[position:start], "little")
        strings.append(payload[start:position].decode("utf-8"))
    return strings
