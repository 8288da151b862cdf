"""How long collectives and messages between the ranks take, by size.

Measured as colrow sends them: through :mod:`colrow.comm.primitives`, on the engine in use, with
all that an engine and Python add to the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.bench.timing import time_rounds
from colrow.comm import point_to_point, primitives
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.planner.links import fit_latency_bandwidth, wire_factor

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send")


@dataclass(frozen=True)
class Curve:
    """The times of one operation, by message size.

    Attributes:
        op: one of OPERATIONS.
        ranks: of the group.
        message_bytes: ascending. The whole buffer, as the ledger counts: the tensor that is
            reduced, broadcast or sent, the result of a gather, the input of a scatter.
        seconds: of one call, for each size: the median of ``rounds``.
        rounds: for each size the seconds of one call in each round, on the slowest rank.
    """

    op: str
    ranks: int
    message_bytes: tuple[int, ...]
    seconds: tuple[float, ...]
    rounds: tuple[tuple[float, ...], ...]

    def bytes_per_second(self, index: int) -> float:
        """Of the ``index``-th size: message bytes by time, nccl-tests' algorithm bandwidth."""
        return self.message_bytes[index] / self.seconds[index]

    def fit(self) -> tuple[float, float] | None:
        """``(latency in seconds, message bytes per second)`` of a straight line through the times.

        None where there is no such line: fewer than two sizes, or times that do not grow.
        """
        try:
            latency, sent_per_second = fit_latency_bandwidth(
                self.message_bytes, self.seconds, self.op, self.ranks
            )
        except ValueError:
            return None
        return latency, sent_per_second / wire_factor(self.op, self.ranks)

    def as_dict(self) -> dict[str, object]:
        """For JSON: the fields, and the fit where there is one."""
        line = self.fit()
        fitted = {} if line is None else {"latency_seconds": line[0], "bytes_per_second": line[1]}
        return {**asdict(self), **fitted}


def message_sizes(ranks: int, smallest: int = 2**10, largest: int = 2**24) -> tuple[int, ...]:
    """From ``smallest`` bytes in steps of 4 to ``largest``, each divisible over the ranks."""
    grain = 4 * ranks
    sizes = []
    size = smallest
    while size <= largest:
        sizes.append(-(-size // grain) * grain)
        size *= 4
    return tuple(sizes)


def measure_links(
    mesh: Mesh,
    *,
    message_bytes: tuple[int, ...] | None = None,
    operations: tuple[str, ...] = OPERATIONS,
    seconds_each: float = 0.2,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Curve]:
    """Times each operation at each size between the ranks of ``mesh.tp``, in fp32.

    Each time is that of one call in a row of calls. In a row of broadcasts every rank is the root
    in turn; a message goes from rank 0 to 1, the next one back, and so on. The slowest rank counts.

    Args:
        message_bytes: sizes of the whole buffer, ascending, each a multiple of 4 bytes x ranks; by
            default :func:`message_sizes`, 1 KiB to 16 MiB.
        operations: of OPERATIONS.
        seconds_each: how long to measure one operation at one size.
        progress: told what is being measured.

    Returns:
        One curve for each operation, the same on every rank.

    Raises:
        ValueError: when there is one rank, or a size or an operation cannot be measured.
        RuntimeError: when the engine returns a wrong result.
    """
    tp = mesh.tp
    if tp.size < 2:
        raise ValueError("a link has two ends: use --tp 2 or more")
    unknown = sorted(set(operations) - set(OPERATIONS))
    if unknown:
        raise ValueError(f"operation {unknown[0]!r}: must be one of {', '.join(OPERATIONS)}")
    sizes = message_sizes(tp.size) if message_bytes is None else message_bytes
    grain = 4 * tp.size
    for size in sizes:
        if size <= 0 or size % grain:
            raise ValueError(
                f"a message of {size} bytes: must be a multiple of {grain} (4 bytes x {tp.size} "
                "ranks)"
            )
    curves = []
    for op in operations:
        progress(f"measuring {op.replace('_', '-')} between {tp.size} ranks")
        calls = (_call(op, size, tp, mesh.device) for size in sizes)
        rounds = tuple(time_rounds(call, mesh, seconds=seconds_each) for call in calls)
        curves.append(Curve(op, tp.size, sizes, tuple(median(r) for r in rounds), rounds))
    return curves


def _call(op: str, size: int, tp: ParallelGroup, device: torch.device) -> Callable[[], object]:
    """One operation on a buffer of its own, once its result was found right."""
    whole = torch.zeros(size // 4, device=device)
    shard = torch.ones(size // 4 // tp.size, device=device)
    match op:
        case "all_reduce":
            _expect(op, primitives.all_reduce(whole + 1, tp), tp.size)
            return lambda: primitives.all_reduce(whole, tp, in_place=True)
        case "all_gather":
            _expect(op, primitives.all_gather(shard, tp, 0), 1)
            return lambda: primitives.all_gather(shard, tp, 0)
        case "reduce_scatter":
            _expect(op, primitives.reduce_scatter(whole + 1, tp, 0), tp.size)
            return lambda: primitives.reduce_scatter(whole, tp, 0)
        case "broadcast":
            return _broadcast(whole, tp)
        case _:
            return _send(whole, tp)


def _broadcast(buffer: Tensor, tp: ParallelGroup) -> Callable[[], object]:
    roots = cycle(range(tp.size))

    def broadcast() -> None:
        dist.broadcast(buffer, group=tp.group, group_src=next(roots))

    buffer.fill_(tp.rank)
    broadcast()
    _expect("broadcast", buffer, 0)
    return broadcast


def _send(buffer: Tensor, tp: ParallelGroup) -> Callable[[], object]:
    """One message a call, from rank 0 to 1 or back; each waits for the one before."""
    senders = cycle((0, 1))

    def send() -> None:
        sender = next(senders)
        if tp.rank == sender:
            point_to_point.send(buffer, tp, 1 - sender)
        elif tp.rank == 1 - sender:
            point_to_point.recv(buffer, tp, sender)

    buffer.fill_(tp.rank)
    send()
    _expect("send", buffer, 0 if tp.rank < 2 else tp.rank)
    return send


def _expect(op: str, result: Tensor, value: int) -> None:
    if not bool((result == value).all()):
        raise RuntimeError(
            f"{op} of {result.numel()} numbers did not give {value} everywhere: the engine is "
            "wrong, and its speed means nothing"
        )
