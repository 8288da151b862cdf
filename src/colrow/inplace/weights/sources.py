"""Tensors that files hold in other forms, described and not read: any part can be read alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from colrow.checkpoint.reader import Ranges, TensorReader, selected_length

Part = Sequence[Ranges]
"""For each dimension, the half-open ranges of indices, concatenated in this order."""


class Source(Protocol):
    """A tensor that can be read in parts."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        ...

    def read(self, part: Part, dtype: torch.dtype) -> Tensor:
        """This part, on the CPU. Little more memory than the part's is used."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor of a file."""

    reader: TensorReader
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file says."""
        return tuple(self.reader.shape(self.name))

    def read(self, part: Part, dtype: torch.dtype) -> Tensor:
        """See :class:`Source`; beyond two dimensions, index by index of the first."""
        if len(part) <= 2:
            return self.reader.read(self.name, *part, dtype=dtype)
        rows, columns, *others = part
        shape = [selected_length(ranges) for ranges in part]
        result = torch.empty(shape, dtype=dtype)
        position = 0
        for start, stop in rows:
            for row in range(start, stop):
                x = self.reader.read(self.name, ((row, row + 1),), columns, dtype=dtype)
                for dim, ranges in enumerate(others, 2):
                    pieces = [x.narrow(dim, a, b - a) for a, b in ranges]
                    x = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
                result[position] = x[0]
                position += 1
        return result


@dataclass(frozen=True)
class Joined:
    """Tensors one after the other along a dimension."""

    parts: tuple[Source, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all together."""
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    def read(self, part: Part, dtype: torch.dtype) -> Tensor:
        """See :class:`Source`."""
        result = torch.empty([selected_length(ranges) for ranges in part], dtype=dtype)
        position = 0
        for start, stop in part[self.dim]:
            offset = 0
            for source in self.parts:
                length = source.shape[self.dim]
                first, last = max(start - offset, 0), min(stop - offset, length)
                offset += length
                if first >= last:
                    continue
                wanted = [*part]
                wanted[self.dim] = ((first, last),)
                place = result.narrow(self.dim, position, last - first)
                place.copy_(source.read(wanted, dtype))
                position += last - first
        return result


@dataclass(frozen=True)
class Stacked:
    """Tensors as the rows of a new first dimension."""

    parts: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all together."""
        return (len(self.parts), *self.parts[0].shape)

    def read(self, part: Part, dtype: torch.dtype) -> Tensor:
        """See :class:`Source`."""
        rows, *others = part
        result = torch.empty([selected_length(ranges) for ranges in part], dtype=dtype)
        indices = [i for start, stop in rows for i in range(start, stop)]
        for position, index in enumerate(indices):
            result[position] = self.parts[index].read(others, dtype)
        return result


@dataclass(frozen=True)
class Swapped:
    """A tensor with two dimensions exchanged."""

    source: Source
    first: int
    second: int

    def _exchanged(self, values: Sequence[object]) -> list[object]:
        swapped = [*values]
        a, b = self.first, self.second
        swapped[a], swapped[b] = swapped[b], swapped[a]
        return swapped

    @property
    def shape(self) -> tuple[int, ...]:
        """After the exchange."""
        return tuple(self._exchanged(self.source.shape))  # type: ignore[arg-type]

    def read(self, part: Part, dtype: torch.dtype) -> Tensor:
        """See :class:`Source`."""
        wanted: list[Ranges] = self._exchanged(part)  # type: ignore[assignment]
        return self.source.read(wanted, dtype).transpose(self.first, self.second)


@dataclass(frozen=True)
class Cut:
    """Neighbouring indices of a dimension."""

    source: Source
    dim: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the cut."""
        shape = list(self.source.shape)
        shape[self.dim] = self.stop - self.start
        return tuple(shape)

    def read(self, part: Part, dtype: torch.dtype) -> Tensor:
        """See :class:`Source`."""
        wanted = [*part]
        moved = ((a + self.start, b + self.start) for a, b in part[self.dim])
        wanted[self.dim] = tuple(moved)
        return self.source.read(wanted, dtype)
