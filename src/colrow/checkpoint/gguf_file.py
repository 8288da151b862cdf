"""Reading slices of GGUF files: only the quantisation blocks that cover them are decoded."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from colrow.checkpoint.gguf_header import GGUFHeader, GGUFTensor, OtherByteOrderError
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

_FLOATS = ("F64", "F32", "F16")
_INTEGERS = ("I64", "I32", "I16", "I8")
_CHUNK_ELEMENTS = 1 << 17
"""Elements decoded at a time: large enough for speed, small enough to stay in the cache."""


class GGUFTensorReader(TensorReader):
    """A ``TensorReader`` over one GGUF file, which also gives its key/value metadata.

    The file is memory-mapped. Quantised blocks run along the last dimension and each stands
    alone, so a column range decodes the blocks that cover it and crops, ``_CHUNK_ELEMENTS`` at a
    time. Decoded values are those of ``gguf.quants.dequantize`` (float32), then ``dtype``.

    Raises:
        ValueError: a damaged file, one of the other byte order, or one part of a split model.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header: GGUFHeader | None = None
        try:
            self._header = GGUFHeader(path)
        except OtherByteOrderError:
            raise ValueError(
                f"{path} is a GGUF file of the other byte order; convert it first"
            ) from None
        except ValueError as cause:
            raise damaged_file(path, "GGUF", cause, "or upgrade the gguf package") from cause
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
        return frozenset(self._header.tensors if self._header is not None else ())

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape in PyTorch's order, [out_features, in_features].

        Raises ``ValueError`` for an unknown name.
        """
        return self._tensor(name).shape

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
        kind = tensor.kind
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
        header = self._open_header()
        return {key: header.value(key) for key in header.keys()}  # noqa: SIM118

    def metadata_value(self, key: str, default: object = None) -> object:
        """One key/value field, or ``default`` where the file does not have it."""
        header = self._open_header()
        return header.value(key) if header.has(key) else default

    def metadata_keys(self) -> frozenset[str]:
        """The keys of all fields."""
        return frozenset(self._open_header().keys())

    def is_quantised(self) -> bool:
        """Whether any tensor is stored in blocks with scales."""
        tensors = self._open_header().tensors.values()
        return any(_block(tensor.kind)[0] > 1 for tensor in tensors)

    def kind(self, name: str) -> GGMLQuantizationType:
        """How a tensor's numbers are stored."""
        return self._tensor(name).kind

    def block(self, name: str) -> tuple[int, int]:
        """Numbers in one of a tensor's blocks, and bytes; 1 and its size for plain types."""
        numbers, size = GGML_QUANT_SIZES[self.kind(name)]
        return int(numbers), int(size)

    def stored(self, name: str, rows: Ranges, columns: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """Rows of a matrix as they are stored, ``[rows, bytes]``, contiguous.

        A part of the mapped file where it has them in one piece, which stays valid; else a copy.

        Args:
            columns: the first and the one behind the last; both at the edge of a block.
        """
        numbers, size = self.block(name)
        shape, data = self.shape(name), self._tensor(name).data.view(np.uint8)
        whole = data.reshape(-1, shape[-1] // numbers * size)
        first, last = (column // numbers * size for column in columns)
        parts = [whole[start:stop, first:last] for start, stop in rows]
        return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def close(self) -> None:
        """Release the file. Tensors already read stay valid."""
        self._header = None

    def _open_header(self) -> GGUFHeader:
        if self._header is None:
            raise ValueError(f"{self.description} was closed; open it again to read it")
        return self._header

    def _tensor(self, name: str) -> GGUFTensor:
        tensors = self._open_header().tensors
        if name not in tensors:
            raise unknown_tensor(name, tensors, self.description)
        return tensors[name]


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
