"""What was sent: one entry for each collective, and sums over entries. Plain Python, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Call:
    """One collective, without its time: what a prediction and a recording have in common.

    Attributes:
        op: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send" or "recv".
        phase: "forward" or "backward".
        layer: name of the layer that asked for it, such as ``blocks.0.attention.output``.
        bytes: size of the whole buffer that the collective works on, on each rank: the tensor that
            is reduced, the result of a gather, the input of a scatter or exchange, the message
            itself. Padding of uneven shards is sent, so it counts.
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
        Rabenseifner and Gropp 2005, section 4). A message counts where it is sent.
        """
        if self.op in ("send", "recv"):
            return float(self.bytes) if self.op == "send" else 0.0
        passes = 2 if self.op == "all_reduce" else 1
        return passes * self.bytes * (ranks - 1) / ranks


@dataclass(frozen=True)
class RecordedCall:
    """A recorded collective and its time.

    Attributes:
        call: what was sent.
        seconds: from issue to completion. On CUDA to where this rank's stream goes on, which is
            later when computation hides the end of the collective.
        exposed_seconds: the part during which this rank (on CUDA: its stream) only waited.
    """

    call: Call
    seconds: float
    exposed_seconds: float


class Ledger:
    """Collects the collectives of the groups that it is attached to (see :func:`record`)."""

    def __init__(self) -> None:
        self._recorded: list[tuple[Call, Callable[[], tuple[float, float]]]] = []
        self._entries: list[RecordedCall] = []

    def add(self, call: Call, times: Callable[[], tuple[float, float]]) -> None:
        """Appends a collective; ``times`` gives its seconds and exposed seconds, and is asked when
        the entries are read: on a device they are known later than the call."""
        self._recorded.append((call, times))

    @property
    def entries(self) -> list[RecordedCall]:
        """The collectives with their times; on CUDA this waits for the last of them."""
        for call, times in self._recorded[len(self._entries) :]:
            self._entries.append(RecordedCall(call, *times()))
        return self._entries

    @property
    def calls(self) -> list[Call]:
        """The collectives in the order in which they finished."""
        return [call for call, _ in self._recorded]

    def seconds(self, *, exposed: bool = False) -> float:
        """Time of all collectives; with ``exposed`` only the part that nothing hid."""
        return sum(e.exposed_seconds if exposed else e.seconds for e in self.entries)


class Recorded(Protocol):
    """What can be recorded: a :class:`colrow.ParallelGroup`."""

    ledger: Ledger | None


@contextmanager
def record(*groups: Recorded) -> Iterator[Ledger]:
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
