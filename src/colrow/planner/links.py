"""How long a message takes between devices: latency, and bandwidth by message size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Op = Literal["all_reduce", "all_gather", "reduce_scatter"]
# (message bytes, bus bandwidth in bytes/s), ascending in size.
Curve = tuple[tuple[float, float], ...]
# Curves by the number of ranks that measured them, ascending.
Curves = tuple[tuple[int, Curve], ...]
# (nodes, seconds), ascending.
ByNodes = tuple[tuple[int, float], ...]

# The size of the collectives that were measured on networks of many nodes.
PIECE_BYTES = float(1 << 28)


def wire_factor(op: str, ranks: int) -> float:
    """Bytes that each rank sends per byte of the buffer, in the ring algorithm.

    (n-1)/n for a gather or a scatter, twice that for an all-reduce (Thakur, Rabenseifner and Gropp
    2005, section 4); the factor by which nccl-tests turns a time into a bus bandwidth.
    """
    return (2 if op == "all_reduce" else 1) * (ranks - 1) / ranks


@dataclass(frozen=True)
class Link:
    """A connection between the devices of a node, or of one device to other nodes.

    Attributes:
        bandwidth: bytes per second that one device sends, at best, in a collective.
        latency_seconds: start of a collective.
        hop_seconds: one further step of a ring or tree.
        curves: bus bandwidth of measured all-reduces by message size and number of ranks; they
            already contain the latencies. Empty: latency and bandwidth are all there is.
        split_curves: the same for all-gather and reduce-scatter; as ``curves`` when empty.
        rounds: between nodes, by operation: what a measured collective of :data:`PIECE_BYTES` took
            beside the time of its bytes at full bandwidth. It grows with the nodes on networks that
            others share or whose steps are slow. Empty: latency and hops.
        stage_waits: between nodes, by the nodes of the whole job: what a message between pipeline
            stages waits beside latency and bytes. Empty: nothing.
        source: where the numbers come from.
    """

    bandwidth: float
    latency_seconds: float
    hop_seconds: float = 0.0
    curves: Curves = ()
    split_curves: Curves = ()
    rounds: tuple[tuple[str, ByNodes], ...] = ()
    stage_waits: ByNodes = ()
    source: str = ""

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"a link's bandwidth of {self.bandwidth} bytes/s: must be positive")
        if self.latency_seconds < 0 or self.hop_seconds < 0:
            raise ValueError(
                f"a link's latency of {self.latency_seconds} s and hop of {self.hop_seconds} s: "
                "must not be negative"
            )
        for _, curve in self.curves + self.split_curves:
            if any(size <= 0 or speed <= 0 for size, speed in curve):
                raise ValueError("a measured curve has a size or bandwidth that is not positive")
            if any(a[0] >= b[0] for a, b in pairwise(curve)):
                raise ValueError("the sizes of a measured curve must ascend")

    @property
    def is_shared(self) -> bool:
        """Whether the network gets slower with every node, so that times on it scatter."""
        return bool(self.rounds)

    def collective_seconds(self, op: str, message_bytes: float, ranks: int) -> float:
        """Time of one collective among ``ranks`` devices of this link.

        Args:
            op: "all_reduce", "all_gather" or "reduce_scatter".
            message_bytes: the whole buffer, as in :attr:`colrow.comm.ledger.Call.bytes`.
        """
        if ranks < 2 or message_bytes <= 0:
            return 0.0
        sent = message_bytes * wire_factor(op, ranks)
        curves = self.curves if op == "all_reduce" else self.split_curves or self.curves
        if curves:
            by_ranks = [(count, _bus_bandwidth(curve, message_bytes)) for count, curve in curves]
            return sent / _between(by_ranks, ranks)
        return (
            self.latency_seconds + self._hops(op, ranks) * self.hop_seconds + sent / self.bandwidth
        )

    def round_seconds(self, op: str, nodes: int) -> float:
        """What the way round so many nodes adds to the time of the bytes; 0 where not measured."""
        measured = dict(self.rounds).get(op)
        return _by_nodes(measured, nodes) if measured else 0.0

    def stage_wait_seconds(self, nodes: float) -> float:
        """What a message between stages waits in a job on so many nodes."""
        return _by_nodes(self.stage_waits, nodes) if self.stage_waits else 0.0

    def send_seconds(self, message_bytes: float) -> float:
        """Time of one point-to-point message."""
        if message_bytes <= 0:
            return 0.0
        return self.latency_seconds + self.hop_seconds + message_bytes / self.bandwidth

    @staticmethod
    def _hops(op: str, ranks: int) -> int:
        """Steps after the first: a ring's, or for an all-reduce a tree's where that is fewer."""
        ring = (2 if op == "all_reduce" else 1) * (ranks - 1)
        tree = 2 * math.ceil(math.log2(ranks))
        return min(ring, tree) if op == "all_reduce" else ring


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Interpolated in the logarithms of both; constant outside."""
    first, last = points[0], points[-1]
    if at <= first[0]:
        return first[1]
    for (x_a, y_a), (x_b, y_b) in pairwise(points):
        if at <= x_b:
            share = math.log(at / x_a) / math.log(x_b / x_a)
            return math.exp((1 - share) * math.log(y_a) + share * math.log(y_b))
    return last[1]


def _bus_bandwidth(curve: Curve, size: float) -> float:
    """Constant time below the curve, constant speed above."""
    first_size, first_speed = curve[0]
    return first_speed * size / first_size if size <= first_size else _between(curve, size)


def _by_nodes(points: ByNodes, nodes: float) -> float:
    """Linear in the number of nodes, beyond the last point in proportion to it."""
    if nodes <= points[0][0]:
        return points[0][1]
    for (x_a, y_a), (x_b, y_b) in pairwise(points):
        if nodes <= x_b:
            return y_a + (y_b - y_a) * (nodes - x_a) / (x_b - x_a)
    return points[-1][1] * nodes / points[-1][0]


def fit_latency_bandwidth(
    message_bytes: Sequence[float], seconds: Sequence[float], op: str, ranks: int
) -> tuple[float, float]:
    """``(latency in seconds, bandwidth in bytes/s)`` of measured collectives.

    Weighted least squares of ``seconds = latency + sent bytes / bandwidth`` with each point's
    relative error counting the same, so that small and large messages are both fitted.
    """
    if len(message_bytes) != len(seconds) or len(seconds) < 2:
        raise ValueError(
            f"a fit needs two or more sizes and as many times, got {len(message_bytes)} and "
            f"{len(seconds)}"
        )
    if min(message_bytes) <= 0 or min(seconds) <= 0:
        raise ValueError("message sizes and times must be positive")
    factor = wire_factor(op, ranks)
    # Weights 1/t^2: minimise the sum of ((a + b x)/t - 1)^2.
    rows = [(1 / t, factor * m / t) for m, t in zip(message_bytes, seconds, strict=True)]
    aa = sum(u * u for u, _ in rows)
    ab = sum(u * v for u, v in rows)
    bb = sum(v * v for _, v in rows)
    ya, yb = sum(u for u, _ in rows), sum(v for _, v in rows)
    determinant = aa * bb - ab * ab
    if determinant <= 0:
        raise ValueError("a fit needs messages of different sizes")
    latency = max(0.0, (ya * bb - yb * ab) / determinant)
    slope = (yb - latency * ab) / bb
    if slope <= 0:
        raise ValueError(
            "the measured times do not grow with the message size; measure larger ones"
        )
    return latency, 1 / slope


def measured_link(
    measurements: Sequence[tuple[str, int, Sequence[float], Sequence[float]]], source: str
) -> Link:
    """A link from measured collectives: ``(op, ranks, message bytes, seconds)`` each.

    All-reduces give one set of curves, gathers and scatters the other; where only one was measured
    it stands for both. Latency and bandwidth are those of the most ranks.
    """
    curves: dict[bool, dict[int, Curve]] = {True: {}, False: {}}
    fits: list[tuple[int, float, float]] = []
    for op, ranks, sizes, seconds in measurements:
        if ranks < 2:
            raise ValueError(f"a measured {op} needs at least 2 ranks, got {ranks}")
        if len(sizes) >= 2:
            fits.append((ranks, *fit_latency_bandwidth(sizes, seconds, op, ranks)))
        factor = wire_factor(op, ranks)
        pairs = sorted(zip(sizes, seconds, strict=True))
        curve = tuple((float(m), factor * m / t) for m, t in pairs)
        curves[op == "all_reduce"].setdefault(ranks, curve)
    if not fits:
        raise ValueError("a link needs at least one collective measured at two or more sizes")
    _, latency, bandwidth = max(fits)
    whole, split = (tuple(sorted(curves[kind].items())) for kind in (True, False))
    return Link(bandwidth, latency, curves=whole or split, split_curves=split, source=source)
