from __future__ import annotations

import pytest
import torch

from colrow import (
    ParallelGroup,
    Partition,
    copy_to_tp,
    from_config,
    full_state_dict,
    gather_from_tp,
    reduce_from_tp,
)
from colrow.comm import point_to_point, primitives
from colrow.comm.clock import Clock
from colrow.comm.ledger import Call, Ledger, RecordedCall, record, summarize
from colrow.layers.options import RopeConfig
from colrow.models.compose import decoder
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
        Call("all_gather", "forward", "c", 8 * tp.size, "int64", "tp"),  # their sizes
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


def check_messages(tp: ParallelGroup) -> None:
    x = torch.ones(2, 5)
    with record(tp) as ledger:
        if tp.rank == 0:
            point_to_point.send(x, tp, 1, layer="a")
        elif tp.rank == 1:
            point_to_point.recv(x, tp, 0, layer="a", phase="backward")
    expected = [
        [Call("send", "forward", "a", 40, "float32")],
        [Call("recv", "backward", "a", 40, "float32")],
    ]
    assert ledger.calls == (expected[tp.rank] if tp.rank < 2 else [])


def assembled(tp: ParallelGroup) -> tuple[list[tuple[str, str, int]], int]:
    """What assembling a model on rank 0 sends, and the bytes of this rank's divided parameters."""
    config = decoder(
        family="llama",
        vocab_size=31,
        hidden_size=16,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        ffn_size=24,
        max_positions=64,
        rope=RopeConfig(theta=10000.0, dims=4),
    )
    model = from_config(config, tp)
    with record(tp) as ledger:
        full_state_dict(model)
    divided = [p for name, p in model.named_parameters() if model.specs[name].dim is not None]
    return [(c.op, c.layer, c.bytes) for c in ledger.calls], sum(4 * p.numel() for p in divided)


def check_failure_ends_the_recording(tp: ParallelGroup) -> None:
    with pytest.raises(ValueError, match="stop"), record(tp):
        raise ValueError("stop")
    assert tp.ledger is None


@pytest.mark.parametrize("n", [2, 3])
def test_records_what_was_sent(ranks: RankPool, n: int) -> None:
    ranks(n, check_recording)
    ranks(n, check_padding_counts)
    ranks(n, check_messages)
    ranks(n, check_failure_ends_the_recording)


def test_assembling_sends_each_divided_parameter_once(ranks: RankPool) -> None:
    (received, _), (sent, held) = ranks(2, assembled)
    # Before that, what all ranks hold is compared: 16 bytes, and 80 for each such tensor.
    compared = [("all_reduce", "same", 16), ("all_reduce", "same", 3 * 80)]
    assert received[:2] == sent[:2] == compared
    received, sent = received[2:], sent[2:]
    assert [("recv", layer, size) for _, layer, size in sent] == received
    assert {op for op, _, _ in sent} == {"send"} and sum(size for _, _, size in sent) == held


class Stream:
    """A device whose work takes seconds that nobody waits for."""

    now = 0.0
    synchronized = 0

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, 0.0

    def record(self, stream: Stream) -> None:
        assert stream is self.stream
        self.at = stream.now

    def synchronize(self) -> None:
        self.stream.synchronized += 1

    def elapsed_time(self, other: Event) -> float:
        assert self.stream.synchronized
        return 1000 * (other.at - self.at)


def test_times_of_a_device_are_its_events_read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 s until the rank waits and 2 s of waiting; the device runs on until the ledger is read."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    tp, call = ParallelGroup.single(), Call("all_reduce", "forward", "a", 8, "float32")
    with record(tp) as ledger:
        clock = Clock(tp, call, torch.device("cuda", 0))
        stream.now += 1
        clock.blocked()
        stream.now += 2
        clock.done()
        stream.now += 100
    assert ledger.calls == [call] and stream.synchronized == 0
    assert ledger.entries == [RecordedCall(call, 3.0, 2.0)] == ledger.entries
    assert ledger.seconds() == 3.0 and ledger.seconds(exposed=True) == 2.0


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


def test_a_message_is_sent_once() -> None:
    sent = [Call(op, "forward", "", 1024, "float32").wire_bytes(4) for op in ("send", "recv")]
    assert sent == [1024, 0]


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
