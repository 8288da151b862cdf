"""How long a message takes between devices: latency, and bandwidth by message size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Op = Literal["all_reduce", "all_gather", "reduce_scatter"]
Curve = tuple[tuple[float, float], ...]


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
        curve: measured ``(message bytes, bus bandwidth in bytes/s)`` of the all-reduce, ascending
            in size; it already contains the latencies. Empty: latency and bandwidth are all there
            is.
        split_curve: the same for all-gather and reduce-scatter; as ``curve`` when empty.
        trees: between nodes: whether an all-reduce may climb a tree over the nodes; where not, it
            takes as long as a gather's way round them all.
        source: where the numbers come from.
    """

    bandwidth: float
    latency_seconds: float
    hop_seconds: float = 0.0
    curve: Curve = ()
    split_curve: Curve = ()
    trees: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"a link's bandwidth of {self.bandwidth} bytes/s: must be positive")
        if self.latency_seconds < 0 or self.hop_seconds < 0:
            raise ValueError(
                f"a link's latency of {self.latency_seconds} s and hop of {self.hop_seconds} s: "
                "must not be negative"
            )
        for curve in (self.curve, self.split_curve):
            if any(size <= 0 or speed <= 0 for size, speed in curve):
                raise ValueError("a measured curve has a size or bandwidth that is not positive")
            if any(a[0] >= b[0] for a, b in pairwise(curve)):
                raise ValueError("the sizes of a measured curve must ascend")

    def collective_seconds(self, op: str, message_bytes: float, ranks: int) -> float:
        """Time of one collective among ``ranks`` devices of this link.

        Args:
            op: "all_reduce", "all_gather" or "reduce_scatter".
            message_bytes: the whole buffer, as in :attr:`colrow.comm.ledger.Call.bytes`.
        """
        if ranks < 2 or message_bytes <= 0:
            return 0.0
        sent = message_bytes * wire_factor(op, ranks)
        curve = self.curve if op == "all_reduce" else self.split_curve or self.curve
        if curve:
            return sent / _bus_bandwidth(curve, message_bytes)
        return (
            self.latency_seconds + self._hops(op, ranks) * self.hop_seconds + sent / self.bandwidth
        )

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


def _bus_bandwidth(curve: Sequence[tuple[float, float]], size: float) -> float:
    """Interpolated in the logarithms; constant time below the curve, constant speed above."""
    first, last = curve[0], curve[-1]
    if size <= first[0]:
        return first[1] * size / first[0]
    if size >= last[0]:
        return last[1]
    for (size_a, speed_a), (size_b, speed_b) in pairwise(curve):
        if size <= size_b:
            share = math.log(size / size_a) / math.log(size_b / size_a)
            return math.exp((1 - share) * math.log(speed_a) + share * math.log(speed_b))
    return last[1]


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

    The all-reduce with the most ranks gives the curve, a gather or scatter the other one.
    """
    curves: dict[bool, tuple[int, Curve]] = {}
    fits: list[tuple[int, float, float]] = []
    for op, ranks, sizes, seconds in measurements:
        if ranks < 2:
            raise ValueError(f"a measured {op} needs at least 2 ranks, got {ranks}")
        if len(sizes) >= 2:
            fits.append((ranks, *fit_latency_bandwidth(sizes, seconds, op, ranks)))
        factor = wire_factor(op, ranks)
        pairs = sorted(zip(sizes, seconds, strict=True))
        curve = tuple((float(m), factor * m / t) for m, t in pairs)
        whole = op == "all_reduce"
        if whole not in curves or ranks > curves[whole][0]:
            curves[whole] = (ranks, curve)
    if not fits:
        raise ValueError("a link needs at least one collective measured at two or more sizes")
    _, latency, bandwidth = max(fits)
    curve = curves.get(True, curves.get(False, (0, ())))[1]
    return Link(
        bandwidth, latency, curve=curve, split_curve=curves.get(False, (0, ()))[1], source=source
    )
