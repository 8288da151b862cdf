"""Which ranks share a node."""

from __future__ import annotations

from dataclasses import replace

import pytest

from colrow.planner import Layout, find_hardware
from colrow.planner.placement import GroupPlace, collective_seconds, place

A100 = find_hardware("a100")


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("tp", (8, 1, 4), GroupPlace(8, nodes=1, members=8, boundaries=0)),
        ("tp", (16, 1, 1), GroupPlace(16, nodes=2, members=8, boundaries=1)),
        # Ranks 6 to 11: two on the first node, four on the second.
        ("tp", (6, 1, 4), GroupPlace(6, nodes=2, members=2, boundaries=1)),
        ("tp", (3, 1, 8), GroupPlace(3, nodes=2, members=1, boundaries=1)),
        ("dp", (8, 1, 4), GroupPlace(4, nodes=4, members=1, boundaries=3)),
        ("dp", (2, 1, 8), GroupPlace(8, nodes=2, members=4, boundaries=1)),
        ("dp", (1, 2, 4), GroupPlace(4, nodes=1, members=4, boundaries=0)),
        # Stages are outermost: 4 x 2 ranks fill a node, so stages lie on different ones.
        ("pp", (4, 2, 2), GroupPlace(2, nodes=2, members=1, boundaries=1)),
        ("pp", (2, 2, 2), GroupPlace(2, nodes=1, members=2, boundaries=0)),
        ("pp", (1, 16, 1), GroupPlace(16, nodes=2, members=8, boundaries=1)),
    ],
)
def test_the_worst_placed_group_counts(
    kind: str, sizes: tuple[int, int, int], expected: GroupPlace
) -> None:
    tp, pp, dp = sizes
    assert place(kind, Layout(tp=tp, pp=pp, dp=dp), A100) == expected  # type: ignore[arg-type]


def test_groups_are_placed_as_counting_every_rank_places_them() -> None:
    for per_node in (3, 8):
        hardware = A100.with_devices_per_node(per_node)
        for tp, dp, pp in ((6, 4, 2), (5, 3, 7), (8, 9, 2), (2, 4, 8), (16, 2, 3)):
            layout = Layout(tp=tp, dp=dp, pp=pp)
            ranks = [
                [((stage * dp) + replica) * tp + rank for rank in range(tp)]
                for stage in range(pp)
                for replica in range(dp)
            ]
            groups = {"tp": ranks, "dp": [], "pp": []}
            for stage in range(pp):
                for rank in range(tp):
                    groups["dp"].append([(stage * dp + r) * tp + rank for r in range(dp)])
            for replica in range(dp):
                for rank in range(tp):
                    groups["pp"].append([(s * dp + replica) * tp + rank for s in range(pp)])
            for kind, members in groups.items():
                nodes = max(len({rank // per_node for rank in group}) for group in members)
                assert place(kind, layout, hardware).nodes == nodes, (kind, layout)  # type: ignore[arg-type]


def test_a_ring_over_nodes_uses_the_adapters_of_all_its_members() -> None:
    """NVIDIA GTC24 S62129: 192 GB/s over 8 adapters of 200 Gbit/s, 24 over one."""
    size = float(1 << 32)
    whole = collective_seconds("all_reduce", size, GroupPlace(16, 2, 8, 1), A100)
    single = collective_seconds("all_reduce", size, GroupPlace(2, 2, 1, 1), A100)
    assert 2 * 15 / 16 * size / whole == pytest.approx(192e9, rel=0.01)
    assert size / single == pytest.approx(24e9, rel=0.01)


def test_on_efa_a_gather_takes_longer_with_every_node() -> None:
    """256 MB on H100: 184.6 GB/s on 2 nodes, 69.0 on 8, 11.0 on 64 (ultrascale playbook)."""
    efa, size = find_hardware("h100-efa"), float(1 << 28)
    for nodes, measured in ((2, 184.6e9), (8, 69.0e9), (64, 11.0e9)):
        ranks = 8 * nodes
        seconds = collective_seconds(
            "all_gather", size, GroupPlace(ranks, nodes, 8, nodes - 1), efa
        )
        assert (ranks - 1) / ranks * size / seconds == pytest.approx(measured, rel=0.02)
    infiniband = replace(efa, network=find_hardware("h100").network)
    where = GroupPlace(64, 8, 8, 7)
    assert collective_seconds("all_gather", size, where, infiniband) < 0.5 * collective_seconds(
        "all_gather", size, where, efa
    )
