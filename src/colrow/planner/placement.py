"""Which ranks share a node, for every kind of group. No torch.

Ranks are numbered as :func:`colrow.init_mesh` and Megatron-LM number them: tensor parallelism
innermost, then context and data parallelism (of whose ranks consecutive ones share experts), then
pipeline stages. A group is then an arithmetic sequence of ranks, and a node holds
``devices_per_node`` consecutive ones.
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

Kind = Literal["tp", "cp", "ep", "dp", "expert dp", "pp"]


class GridSizes(Protocol):
    """What of a layout decides where its ranks are."""

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""

    @property
    def cp(self) -> int:
        """Context-parallel size."""

    @property
    def ep(self) -> int:
        """Expert-parallel size."""

    @property
    def dp(self) -> int:
        """Data-parallel size."""

    @property
    def pp(self) -> int:
        """Pipeline stages."""


@dataclass(frozen=True)
class GroupPlace:
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


def place(kind: Kind, layout: GridSizes, hardware: Hardware) -> GroupPlace:
    """Where the groups of this kind lie.

    A tensor-parallel group that does not tile a node, such as 6 ranks in nodes of 8, has groups
    that straddle two nodes, and it is those that count.
    """
    replicas = layout.cp * layout.dp
    groups = {  # members, and the distance between them; "dp" reduces over replicas of both kinds
        "tp": (layout.tp, 1),
        "cp": (layout.cp, layout.tp),
        "ep": (layout.ep, layout.tp),
        "dp": (replicas, layout.tp),
        "expert dp": (replicas // layout.ep, layout.tp * layout.ep),
        "pp": (layout.pp, layout.tp * replicas),
    }
    ranks, stride = groups[kind]
    world = layout.tp * replicas * layout.pp
    return _worst(ranks, stride, world, hardware.devices_per_node)


def job_nodes(layout: GridSizes, hardware: Hardware) -> int:
    """Nodes of the whole job."""
    return math.ceil(layout.tp * layout.cp * layout.dp * layout.pp / hardware.devices_per_node)


@lru_cache(maxsize=65536)
def _worst(ranks: int, stride: int, world: int, per_node: int) -> GroupPlace:
    span = ranks * stride
    # Groups repeat where a span begins at the start of a node, and inside a node's length.
    starts = range(0, min(world, math.lcm(span, per_node)), span)
    found = {
        _one(ranks, stride, start + offset, per_node)
        for start in starts
        for offset in range(min(stride, per_node))
    }
    return max(found, key=lambda p: (p.nodes, -p.members, p.boundaries))


def _one(ranks: int, stride: int, first: int, per_node: int) -> GroupPlace:
    nodes = [(first + stride * index) // per_node for index in range(ranks)]
    counts = Counter(nodes)
    return GroupPlace(
        ranks, len(counts), min(counts.values()), sum(a != b for a, b in pairwise(nodes))
    )


def collective_seconds(op: str, size: float, where: GroupPlace, hardware: Hardware) -> float:
    """Time of one collective over a whole buffer of ``size`` bytes.

    Inside a node by the node's link. Across nodes a group with several members on each uses the
    adapters of all of them, up to the speed of the node's link; the ring passes every rank, a tree
    (all-reduce only) every node once up and once down. Where the way round the nodes was measured
    and takes longer than these steps, that counts.
    """
    if where.ranks < 2 or size <= 0:
        return 0.0
    if where.nodes == 1:
        return hardware.link.collective_seconds(op, size, where.ranks)
    network, both_ways = hardware.network, 2 if op == "all_reduce" else 1
    bandwidth = min(where.members * network.bandwidth, hardware.link.bandwidth)
    inside = (where.ranks - where.nodes) * hardware.link.hop_seconds
    hops = both_ways * (where.nodes * network.hop_seconds + inside)
    if op == "all_reduce":
        hops = min(hops, 2 * math.ceil(math.log2(where.nodes)) * network.hop_seconds)
    way = max(hops, network.round_seconds(op, where.nodes))
    return network.latency_seconds + way + size * wire_factor(op, where.ranks) / bandwidth


# What an all-to-all reaches of a node's link, and its start per member: fitted by SimuMax on 8 B200
# (MooreThreads/SimuMax 4dcaae5, configs/system/b200_bf16_ceperm.json: 59.7 % of 900 GB/s, 7.3 us).
# As a share of an all-reduce's bus bandwidth there, 680 GB/s.
ALL_TO_ALL_SHARE = 0.597 * 900 / 680
ALL_TO_ALL_MEMBER_SECONDS = 7.3e-6


def all_to_all_seconds(size: float, where: GroupPlace, hardware: Hardware) -> float:
    """Time in which every member sends ``size`` bytes, an equal part to each member.

    Across nodes each device has its own adapter for what leaves the node.
    """
    if where.ranks < 2 or size <= 0:
        return 0.0
    inside = size * (where.members - 1) / where.ranks
    across = size * (where.ranks - where.members) / where.ranks
    seconds = inside / (hardware.link.bandwidth * ALL_TO_ALL_SHARE)
    seconds = max(seconds, across / hardware.network.bandwidth)
    return seconds + where.ranks * ALL_TO_ALL_MEMBER_SECONDS


def send_seconds(size: float, where: GroupPlace, hardware: Hardware) -> float:
    """Time to hand ``size`` bytes to the next member, at the slowest of the group's boundaries."""
    return (hardware.network if where.boundaries else hardware.link).send_seconds(size)
