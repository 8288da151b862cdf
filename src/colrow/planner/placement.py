"""Which ranks share a node, for every kind of group. No torch.

Ranks are numbered as :func:`colrow.init_mesh` and Megatron-LM number them: tensor parallelism
innermost, then data parallelism, then pipeline stages. A group is then an arithmetic sequence of
ranks, and a node holds ``devices_per_node`` consecutive ones.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, Protocol

from colrow.planner.hardware import Hardware
from colrow.planner.links import wire_factor

Kind = Literal["tp", "dp", "pp"]


class Sizes(Protocol):
    """What of a layout decides where its ranks are."""

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""

    @property
    def dp(self) -> int:
        """Data-parallel size."""

    @property
    def pp(self) -> int:
        """Pipeline stages."""


@dataclass(frozen=True)
class Place:
    """Where the worst placed group of its kind lies; the others wait for it.

    Attributes:
        ranks: members of a group.
        nodes: over how many nodes the group is spread.
        members: members on the node that has fewest of them. As many adapters carry a ring, since
            each device has its own.
        boundaries: how many of the group's neighbours, ``ranks - 1`` pairs, are on different nodes.
    """

    ranks: int
    nodes: int
    members: int
    boundaries: int


def place(kind: Kind, layout: Sizes, hardware: Hardware) -> Place:
    """Where the groups of this kind lie.

    A tensor-parallel group that does not tile a node, such as 6 ranks in nodes of 8, has groups
    that straddle two nodes, and it is those that count.
    """
    strides = {"tp": 1, "dp": layout.tp, "pp": layout.tp * layout.dp}
    ranks = {"tp": layout.tp, "dp": layout.dp, "pp": layout.pp}[kind]
    world = layout.tp * layout.dp * layout.pp
    return _worst(ranks, strides[kind], world, hardware.devices_per_node)


@lru_cache(maxsize=65536)
def _worst(ranks: int, stride: int, world: int, per_node: int) -> Place:
    span = ranks * stride
    # Groups repeat where a span begins at the start of a node, and inside a node's length.
    starts = range(0, min(world, math.lcm(span, per_node)), span)
    found = {
        _one(ranks, stride, start + offset, per_node)
        for start in starts
        for offset in range(min(stride, per_node))
    }
    return max(found, key=lambda p: (p.nodes, -p.members, p.boundaries))


def _one(ranks: int, stride: int, first: int, per_node: int) -> Place:
    nodes = [(first + stride * index) // per_node for index in range(ranks)]
    counts = Counter(nodes)
    return Place(ranks, len(counts), min(counts.values()), sum(a != b for a, b in pairwise(nodes)))


def collective_seconds(op: str, size: float, where: Place, hardware: Hardware) -> float:
    """Time of one collective over a whole buffer of ``size`` bytes.

    Inside a node by the node's link. Across nodes a group with several members on each uses the
    adapters of all of them, up to the speed of the node's link; the ring passes every rank, a tree
    (all-reduce only) every node once up and once down.
    """
    if where.ranks < 2 or size <= 0:
        return 0.0
    if where.nodes == 1:
        return hardware.link.collective_seconds(op, size, where.ranks)
    network, both_ways = hardware.network, 2 if op == "all_reduce" else 1
    bandwidth = min(where.members * network.bandwidth, hardware.link.bandwidth)
    inside = (where.ranks - where.nodes) * hardware.link.hop_seconds
    if network.trees:
        hops = both_ways * (where.nodes * network.hop_seconds + inside)
        if op == "all_reduce":
            hops = min(hops, 2 * math.ceil(math.log2(where.nodes)) * network.hop_seconds)
    else:
        hops = where.nodes * network.hop_seconds + inside
    return network.latency_seconds + hops + size * wire_factor(op, where.ranks) / bandwidth


def send_seconds(size: float, where: Place, hardware: Hardware) -> float:
    """Time to hand ``size`` bytes to the next member, at the slowest of the group's boundaries."""
    return (hardware.network if where.boundaries else hardware.link).send_seconds(size)
