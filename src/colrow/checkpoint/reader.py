"""What a checkpoint reader is: named tensors of which any rows and columns can be read alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Protocol, Self

import torch

Ranges = tuple[tuple[int, int], ...]
"""Half-open (start, stop) index ranges, read and concatenated in this order; () selects nothing."""

_CHUNK_BYTES = 4 << 20


class TensorReader(Protocol):
    """Read access to the tensors of one checkpoint, a slice at a time.

    colrow's own readers derive from it, and so are closed at the end of a ``with``; any other that
    has these methods will do.

    Shapes are PyTorch's: a linear weight is [out_features, in_features]. Every method raises
    ``ValueError`` for a tensor that the checkpoint does not hold, naming the closest ones it does.
    """

    @property
    def description(self) -> str:
        """Path and format, for messages."""
        ...

    def names(self) -> frozenset[str]:
        """The names of all tensors, as the file spells them."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        ...

    def read(
        self,
        name: str,
        rows: Ranges | None = None,
        columns: Ranges | None = None,
        *,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Read these rows (dimension 0) and columns (dimension 1); ``None`` means all of them.

        Returns a contiguous tensor on the CPU in ``dtype`` that owns its memory, of shape
        [sum of rows, sum of columns, ...]; a 1-D tensor has rows only. Nothing larger than the
        result plus a small constant is allocated.

        Raises:
            ValueError: a range outside the tensor, ranges for a dimension that it does not have,
                a stored type that cannot be converted to ``dtype``, or a closed reader.
        """
        ...

    def close(self) -> None:
        """Release the files. Tensors already read stay valid. Closing twice is harmless."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def select(
    name: str, shape: tuple[int, ...], rows: Ranges | None, columns: Ranges | None
) -> tuple[Ranges, ...]:
    """The ranges to read in each dimension that can be sliced: the first two, or fewer.

    ``None`` becomes the whole dimension.

    Raises:
        ValueError: a range outside the tensor, or ranges for a dimension that it does not have.
    """
    selected: list[Ranges] = []
    for dimension, (what, ranges) in enumerate((("rows", rows), ("columns", columns))):
        if dimension >= len(shape):
            if ranges is not None:
                raise ValueError(
                    f"tensor {name!r} has shape {list(shape)}, so it has no {what} to select; "
                    f"leave {what} out"
                )
            continue
        length = shape[dimension]
        for start, stop in ranges or ():
            if not 0 <= start <= stop <= length:
                raise ValueError(
                    f"{what} ({start}, {stop}) of tensor {name!r} lie outside its shape "
                    f"{list(shape)}: need 0 <= start <= stop <= {length}"
                )
        selected.append(((0, length),) if ranges is None else tuple(ranges))
    return tuple(selected)


def selected_length(ranges: Ranges) -> int:
    """How many indices the ranges select."""
    return sum(stop - start for start, stop in ranges)


def placements(ranges: Ranges) -> Iterator[tuple[slice, slice]]:
    """Pair each non-empty range of the source with its place in the concatenated result."""
    position = 0
    for start, stop in ranges:
        if stop > start:
            yield slice(start, stop), slice(position, position + stop - start)
            position += stop - start


def row_chunks(
    part: torch.Tensor, rows: Ranges, *, multiple: int = 1
) -> Iterator[tuple[torch.Tensor, Ranges]]:
    """A few rows of ``part`` at a time, about 4 MiB, each with those of the file that go there.

    Args:
        part: ``[sum of rows, ...]``, to be filled; views of it are given.
        rows: the rows of the file that it holds, in its order.
        multiple: only whole multiples of so many rows are given, however large.
    """
    row_bytes = max(1, part[:1].numel() * part.element_size())
    step = max(1, _CHUNK_BYTES // row_bytes)
    step = max(multiple, step - step % multiple)
    for first in range(0, part.shape[0], step):
        last = min(first + step, part.shape[0])
        yield part[first:last], _within(rows, first, last)


def _within(ranges: Ranges, first: int, last: int) -> Ranges:
    """Of the indices that ``ranges`` list, one after the other, the first-th to the last-th."""
    found, passed = [], 0
    for start, stop in ranges:
        low, high = start + max(first - passed, 0), start + min(last - passed, stop - start)
        if low < high:
            found.append((low, high))
        passed += stop - start
    return tuple(found)


def unknown_tensor(name: str, names: Iterable[str], description: str) -> ValueError:
    """The error for a tensor that the checkpoint lacks."""
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ValueError(f"{description} has no tensor {name!r}{hint}")


def unsupported_type(
    name: str, stored: str, supported: Iterable[str], description: str
) -> ValueError:
    """The error for a tensor stored in a type that cannot be turned into plain numbers."""
    return ValueError(
        f"tensor {name!r} of {description} is stored as {stored}, which cannot be read; "
        f"supported: {', '.join(supported)}"
    )


def check_conversion(name: str, stored: str, stored_is_float: bool, dtype: torch.dtype) -> None:
    """Refuse to round fractions away, and to take whole numbers for weights.

    A float tensor is read into a float dtype only, and an integer one into an integer dtype only:
    weights that are stored as integers stand for other numbers, with scales that are elsewhere.
    """
    if stored_is_float and not dtype.is_floating_point:
        raise ValueError(
            f"tensor {name!r} is stored as {stored} and was asked for as {dtype}, which would drop "
            "its fractions; ask for a floating-point dtype"
        )
    if dtype.is_floating_point and not stored_is_float:
        raise ValueError(
            f"tensor {name!r} is stored as {stored} where {dtype} is expected: quantised weights "
            "are not read from such files; use the original checkpoint or a GGUF file"
        )
