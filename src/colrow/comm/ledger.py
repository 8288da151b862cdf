"""What was sent: one entry for each collective, and sums over entries. Plain Python, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from colrow.mesh import ParallelGroup

Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Call:
    """One collective, without its time: what a prediction and a recording have in common.

    Attributes:
        op: "all_reduce", "all_gather" or "reduce_scatter".
        phase: "forward" or "backward".
        layer: name of the layer that asked for it, such as ``blocks.0.attention.output``.
        bytes: size of the whole buffer that the collective works on, on each rank: the tensor that
            is reduced, the result of a gather, the input of a scatter. Padding of uneven shards is
            sent, so it counts.
        dtype: element type, such as "float32".
        group: the mesh dimension, "tp", "dp" or "pp".
    """

    op: str
    phase: Phase
    layer: str
    bytes: int
    dtype: str
    group: str = "tp"

    def wire_bytes(self, ranks: int) -> float:
        """Bytes that each rank sends in the ring algorithm.

        (n-1)/n of the buffer for a gather or a scatter, twice that for an all-reduce (Thakur,
        Rabenseifner and Gropp 2005, section 4).
        """
        passes = 2 if self.op == "all_reduce" else 1
        return passes * self.bytes * (ranks - 1) / ranks


@dataclass(frozen=True)
class Entry:
    """A recorded collective and its time.

    Attributes:
        call: what was sent.
        seconds: from issue to completion.
        exposed_seconds: the part during which this rank only waited.
    """

    call: Call
    seconds: float
    exposed_seconds: float


@dataclass
class Ledger:
    """Collects the collectives of the groups that it is attached to (see :func:`record`)."""

    entries: list[Entry] = field(default_factory=list)

    def add(self, call: Call, seconds: float, exposed_seconds: float) -> None:
        """Appends one finished collective."""
        self.entries.append(Entry(call, seconds, exposed_seconds))

    @property
    def calls(self) -> list[Call]:
        """The collectives in the order in which they finished."""
        return [entry.call for entry in self.entries]

    def seconds(self, *, exposed: bool = False) -> float:
        """Time of all collectives; with ``exposed`` only the part that nothing hid."""
        return sum(e.exposed_seconds if exposed else e.seconds for e in self.entries)


@contextmanager
def record(*groups: ParallelGroup) -> Iterator[Ledger]:
    """Records every collective of these groups on this rank while the block runs.

    Recording is for eager execution: a compiled graph issues its collectives without Python.
    """
    ledger = Ledger()
    before = [group.ledger for group in groups]
    for group in groups:
        group.ledger = ledger
    try:
        yield ledger
    finally:
        for group, previous in zip(groups, before, strict=True):
            group.ledger = previous


def summarize(calls: Iterable[Call]) -> list[dict[str, object]]:
    """Equal calls as one row with their ``count``; ``bytes`` is that of one call.

    Rows are sorted by phase (forward first), layer and operation, so that two summaries are equal
    exactly when the same calls were made, in whatever order.
    """
    counts = Counter(calls)
    order = sorted(counts, key=lambda c: (c.phase != "forward", _natural(c.layer), c.op, c.bytes))
    return [{**asdict(call), "count": counts[call]} for call in order]


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts ``blocks.2`` before ``blocks.10``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))
