"""How layers divide their work beyond their weights: one value that is handed down. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from colrow.partition import Partition


@dataclass(frozen=True)
class Sharding:
    """How a tensor-parallel layer treats the sequence and its collectives.

    Attributes:
        sequence_parallel: norms, dropout and residuals work on a shard of the sequence, and layers
            gather it and scatter it again (Korthikanti et al. 2022, section 4.2.2).
        keep_gathered_input: with sequence parallelism, keep the gathered input for backward (less
            communication) or gather it again (less memory).
        overlap: hide the collective of backward behind the weight gradient. Without it a layer is
            an explicit collective and ``F.linear``, node by node, which pipeline schedules that
            split backward need; under sequence parallelism that form keeps the gathered input.

    Raises:
        ValueError: with sequence parallelism, neither ``overlap`` nor ``keep_gathered_input``: the
            plain form cannot gather again.
    """

    sequence_parallel: bool = False
    keep_gathered_input: bool = True
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.sequence_parallel and not self.keep_gathered_input and not self.overlap:
            raise ValueError(
                "overlap=False and keep_gathered_input=False exclude each other under sequence "
                "parallelism: the plain form keeps its gathered input for backward; set one of the "
                "two to True"
            )

    @classmethod
    def of(cls, given: Sharding | None, sequence_parallel: bool = False) -> Sharding:
        """The value that is meant, ``sequence_parallel=True`` being short for its field."""
        sharding = given or cls()
        return replace(sharding, sequence_parallel=True) if sequence_parallel else sharding


class WholeSequence(Enum):
    """Says of one call of a sequence-parallel layer that every rank holds the whole sequence."""

    WHOLE = "whole"


WHOLE = WholeSequence.WHOLE
"""As in generation with a key-value cache."""

SequenceDivision: TypeAlias = Partition | WholeSequence | None
"""How a call's sequence lies over the ranks; None where the layer is to find out."""
