"""Which rows of a parameter several ranks hold, and their place in the buffer that is summed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from colrow.layers.describe import ParameterSpec
from colrow.partition import ShardSpec


@dataclass(frozen=True)
class SharedRows:
    """The part of a parameter's first dimension that several ranks hold.

    Attributes:
        total: rows in the all-reduce buffer: those that any two ranks of the group share.
        pieces: ``(local start, buffer start, rows)`` of the rows that this rank holds.
    """

    total: int
    pieces: tuple[tuple[int, int, int], ...]

    @classmethod
    def whole(cls, rows: int) -> SharedRows:
        """Every rank holds all rows and contributes to their gradient."""
        return cls(rows, ((0, 0, rows),))

    def is_whole(self, rows: int) -> bool:
        """Whether all of this rank's ``rows`` make up the buffer, in order."""
        return self == SharedRows.whole(rows)

    @classmethod
    def of_parameter(
        cls, parameter: ParameterSpec, rank: int, *, by_sequence: bool = False
    ) -> SharedRows:
        """What the description of a parameter says.

        Args:
            by_sequence: each rank computes its own positions of the sequence.
        """
        if not parameter.summed_elements(sequence_parallel=by_sequence):
            return cls(0, ())
        shard = parameter.shard
        return cls.whole(shard.shape[0]) if shard.dim is None else cls.of(shard, rank)

    @classmethod
    def of(cls, spec: ShardSpec, rank: int) -> SharedRows:
        """The rows that lie in the ranges of more than one rank."""
        pieces, total = [], 0
        for block, offset in zip(spec.blocks, spec.local_offsets(rank), strict=True):
            start, stop = block.bounds[rank]
            for first, last in block.shared:
                held_first, held_last = max(first, start), min(last, stop)
                if held_first < held_last:
                    local = offset + held_first - start
                    pieces.append((local, total + held_first - first, held_last - held_first))
                total += last - first
        return cls(total, tuple(pieces))

    def pack(self, grad: Tensor) -> Tensor:
        """The shared rows of ``grad`` in the buffer's order, zeros where this rank holds none."""
        if self.is_whole(grad.shape[0]):
            return grad
        buffer = grad.new_zeros(self.total, *grad.shape[1:])
        for local, start, count in self.pieces:
            buffer[start : start + count] = grad[local : local + count]
        return buffer

    def unpack(self, grad: Tensor, summed: Tensor) -> Tensor:
        """``grad`` with its shared rows replaced by their sum, a buffer of :meth:`pack`'s form."""
        if self.is_whole(grad.shape[0]):
            return summed
        result = grad.clone()
        for local, start, count in self.pieces:
            result[local : local + count] = summed[start : start + count]
        return result
