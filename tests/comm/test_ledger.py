from __future__ import annotations

import pytest
import torch

from colrow import ParallelGroup, Partition, copy_to_tp, gather_from_tp, reduce_from_tp
from colrow.comm import primitives
from colrow.comm.ledger import Call, Ledger, record, summarize
from tests.ranks import RankPool


def check_recording(tp: ParallelGroup) -> None:
    x = torch.ones(3, 5, requires_grad=True)
    with record(tp) as outer:
        reduce_from_tp(x, tp, layer="a")
        with record(tp) as inner:
            copy_to_tp(x, tp, layer="b").sum().backward()
        gather_from_tp(x.bfloat16(), tp, layer="c")
    reduce_from_tp(x, tp, layer="unrecorded")
    assert tp.ledger is None
    assert inner.calls == [Call("all_reduce", "backward", "b", 60, "float32", "tp")]
    assert outer.calls == [
        Call("all_reduce", "forward", "a", 60, "float32", "tp"),
        Call("all_gather", "forward", "c", 30 * tp.size, "bfloat16", "tp"),
    ]
    for entry in outer.entries:
        assert 0 <= entry.exposed_seconds <= entry.seconds
    assert outer.seconds() == sum(entry.seconds for entry in outer.entries)
    assert outer.seconds(exposed=True) == sum(entry.exposed_seconds for entry in outer.entries)


def check_padding_counts(tp: ParallelGroup) -> None:
    """Uneven shards are sent as large as the largest one."""
    p = Partition.from_sizes([4, *[1] * (tp.size - 1)])
    with record(tp) as ledger:
        primitives.all_gather(torch.zeros(2, p.size(tp.rank)), tp, 1, partition=p)
        primitives.reduce_scatter(torch.zeros(2, p.length), tp, 1, partition=p)
    assert [call.bytes for call in ledger.calls] == [2 * 4 * tp.size * 4] * 2


def check_failure_ends_the_recording(tp: ParallelGroup) -> None:
    with pytest.raises(ValueError, match="stop"), record(tp):
        raise ValueError("stop")
    assert tp.ledger is None


@pytest.mark.parametrize("n", [2, 3])
def test_records_what_was_sent(ranks: RankPool, n: int) -> None:
    ranks(n, check_recording)
    ranks(n, check_padding_counts)
    ranks(n, check_failure_ends_the_recording)


def test_one_rank_sends_nothing() -> None:
    tp = ParallelGroup.single()
    with record(tp) as ledger:
        reduce_from_tp(torch.ones(3), tp)
    assert ledger.calls == []


def test_groups_are_recorded_together() -> None:
    tp, dp = ParallelGroup.single("tp"), ParallelGroup.single("dp")
    with record(tp, dp) as ledger:
        assert tp.ledger is dp.ledger is ledger
    assert tp.ledger is None and dp.ledger is None


@pytest.mark.parametrize("ranks_in_ring", [2, 4, 8])
def test_wire_bytes_are_those_of_the_ring(ranks_in_ring: int) -> None:
    n = ranks_in_ring
    sent = {op: Call(op, "forward", "", 1024, "float32").wire_bytes(n) for op in _PASSES}
    # In a ring each rank sends n - 1 pieces of 1/n of the buffer in each pass.
    assert sent == {op: passes * (n - 1) * 1024 / n for op, passes in _PASSES.items()}


_PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


def test_summaries_count_equal_calls_in_a_fixed_order() -> None:
    def call(layer: str, op: str = "all_reduce", phase: str = "forward", size: int = 8) -> Call:
        return Call(op, phase, layer, size, "float32")  # type: ignore[arg-type]

    calls = [
        call("blocks.10.mlp"),
        call("blocks.2.mlp", phase="backward"),
        call("blocks.2.mlp"),
        call("blocks.10.mlp"),
        call("blocks.2.mlp", op="all_gather"),
        call("blocks.2.mlp", size=4),
        call("embedding"),
    ]
    rows = summarize(calls)
    assert [(r["phase"], r["layer"], r["op"], r["bytes"], r["count"]) for r in rows] == [
        ("forward", "blocks.2.mlp", "all_gather", 8, 1),
        ("forward", "blocks.2.mlp", "all_reduce", 4, 1),
        ("forward", "blocks.2.mlp", "all_reduce", 8, 1),
        ("forward", "blocks.10.mlp", "all_reduce", 8, 2),
        ("forward", "embedding", "all_reduce", 8, 1),
        ("backward", "blocks.2.mlp", "all_reduce", 8, 1),
    ]
    assert summarize(reversed(calls)) == rows
    assert set(rows[0]) == {"op", "phase", "layer", "bytes", "dtype", "group", "count"}
    assert summarize([]) == [] and Ledger().seconds() == 0
