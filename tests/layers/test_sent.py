"""What each layer alone sends: the tables of the docstrings, recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from colrow import (
    ColumnParallelLinear,
    ParallelDropout,
    ParallelGroup,
    Partition,
    RMSNorm,
    RowParallelLinear,
    vocab_parallel_cross_entropy,
)
from colrow.comm import primitives
from colrow.comm.ledger import record
from colrow.sharding import Sharding
from tests.layers.catalogue import BATCH, BY_SEQUENCE, CASES, FFN, IN, OUT, SEQUENCE, Case
from tests.layers.dense import random
from tests.ranks import RankPool

Sent = list[tuple[str, str, int]]
ITEM = 8  # bytes of an fp64 number


def padded(length: int, n: int) -> int:
    """What n shards of the largest size hold."""
    return -(-length // n) * n


def shared_heads(q: int, kv: int, n: int) -> int:
    """KV heads that query heads of more than one rank read."""
    owner = [rank for rank in range(n) for _ in range(Partition.even(q, n).size(rank))]
    readers = [{owner[head] for head in range(q) if head // (q // kv) == k} for k in range(kv)]
    return sum(len(ranks) > 1 for ranks in readers)


def expected(name: str, n: int) -> Sent:
    """(operation, phase, bytes) of one forward and backward pass."""
    whole = BATCH * SEQUENCE * IN * ITEM
    split = BATCH * padded(SEQUENCE, n) * IN * ITEM
    head_rows, width = 2 * 4, IN + 1  # a KV head's rows of K and V; weight and bias of each

    def bucket(numbers: int) -> Sent:
        return [("all_reduce", "backward", numbers * ITEM)] if numbers else []

    column = [("all_reduce", "backward", whole)]
    column_split = [("all_gather", "forward", split), ("reduce_scatter", "backward", split)]
    row = [("all_reduce", "forward", whole)]
    row_split = [("reduce_scatter", "forward", split), ("all_gather", "backward", split)]
    table: dict[str, Sent] = {
        "column": column,
        "column without overlap": column,
        "column, gathered": [
            *column,
            ("all_gather", "forward", BATCH * SEQUENCE * padded(OUT, n) * ITEM),
        ],
        "column, sequence-parallel": column_split,
        "column, gathering again": [*column_split, ("all_gather", "backward", split)],
        "row": row,
        "row of a whole input": [
            *row,
            ("all_gather", "backward", BATCH * SEQUENCE * padded(OUT, n) * ITEM),
        ],
        "row, sequence-parallel": [*row_split, *bucket(IN)],
        "qkv": [*column, *bucket(shared_heads(9, 3, n) * head_rows * width)],
        "gate and up": column,
        "embedding": row,
        "embedding, sequence-parallel": row_split,
        "positions, sequence-parallel": bucket(23 * IN),
        # Weights of the shared KV heads, and the two norms of query and key heads.
        "attention": [*column, *row, *bucket(shared_heads(9, 3, n) * head_rows * IN + 2 * 4)],
        # Weights and biases of the one KV head, and the output's bias.
        "attention, sequence-parallel": [
            *column_split,
            *row_split,
            *bucket(head_rows * width + IN),
        ],
        "mlp": [*column, *row],
        "block": [*column * 2, *row * 2, *bucket(shared_heads(9, 3, n) * head_rows * IN + 2 * 4)],
        # Two row biases and two layer norms; no KV head is shared where each query head has one.
        "block, sequence-parallel": [*column_split * 2, *row_split * 2, *bucket(2 * IN + 4 * IN)],
        "rms norm of a shard": bucket(IN),
        "layer norm of a shard": bucket(2 * IN),
    }
    return table[name]


def run(case: Case, layer: nn.Module, tp: ParallelGroup, *, x_grad: bool = True) -> Tensor:
    """A forward pass on this rank's part of the input."""
    x = case.input(torch.float64).detach()
    if case.x == BY_SEQUENCE:
        start, stop = Partition.even(SEQUENCE, tp.size).bounds[tp.rank]
        x = x[:, start:stop]
    elif not isinstance(case.x, str):
        (block,) = case.x(tp.size)
        x = x[..., block.bounds[tp.rank][0] : block.bounds[tp.rank][1]]
    x = x.clone().requires_grad_(x_grad and x.is_floating_point())
    options = {"sequence": Partition.even(SEQUENCE, tp.size)} if case.takes_sequence else {}
    result: Tensor = layer(x, **options)
    return result


def step(case: Case, layer: nn.Module, tp: ParallelGroup, *, x_grad: bool = True) -> None:
    """A forward and backward pass."""
    run(case, layer, tp, x_grad=x_grad).sum().backward()


def check_sent(tp: ParallelGroup) -> None:
    for case in CASES:
        layer = case.make(tp, torch.float64)
        with record(tp) as ledger:
            step(case, layer, tp)
        sent = Counter((call.op, call.phase, call.bytes) for call in ledger.calls)
        assert sent == Counter(expected(case.name, tp.size)), f"{case.name}: {sent}"
        assert {call.dtype for call in ledger.calls} == {"float64"}
        assert {call.group for call in ledger.calls} == {"tp"}
        with record(tp) as ledger, torch.no_grad():
            run(case, layer, tp)
        sent = Counter((call.op, call.phase, call.bytes) for call in ledger.calls)
        forward = [call for call in expected(case.name, tp.size) if call[1] == "forward"]
        assert sent == Counter(forward), f"{case.name} without gradients: {sent}"


def check_names(tp: ParallelGroup) -> set[str]:
    """Calls are filed under the layer that made them."""
    (case,) = (case for case in CASES if case.name == "block")
    with record(tp) as ledger:
        step(case, case.make(tp, torch.float64), tp)
    return {call.layer for call in ledger.calls}


def check_less(tp: ParallelGroup) -> None:
    """What need not be sent is not."""
    by_name = {case.name: case for case in CASES}
    column = by_name["column"].make(tp, torch.float64)
    with record(tp) as ledger:
        step(by_name["column"], column, tp, x_grad=False)
    assert ledger.calls == []
    again = by_name["column, gathering again"].make(tp, torch.float64)
    again.weight.requires_grad_(False)  # its gradient is what the input is gathered for
    with record(tp) as ledger:
        step(by_name["column, gathering again"], again, tp)
    assert [call.op for call in ledger.calls] == ["all_gather", "reduce_scatter"]
    row = by_name["row, sequence-parallel"].make(tp, torch.float64)
    row.bias.requires_grad_(False)
    with record(tp) as ledger:
        step(by_name["row, sequence-parallel"], row, tp)
    assert [call.op for call in ledger.calls] == ["reduce_scatter", "all_gather"]
    norm = by_name["layer norm of a shard"].make(tp, torch.float64)
    norm.weight.requires_grad_(False)  # leaves the bias alone in the bucket
    with record(tp) as ledger:
        step(by_name["layer norm of a shard"], norm, tp)
    assert [call.bytes for call in ledger.calls] == [IN * ITEM]
    with record(tp) as ledger:
        RMSNorm(IN, tp, eps=1e-5)(random(3, IN, dtype=torch.float32)).sum().backward()
        ParallelDropout(0.5)(random(3, IN))
    assert ledger.calls == []


def check_loss(tp: ParallelGroup) -> None:
    """Three numbers per token and rank; one more for label smoothing; the sizes and one more for
    a checksum if no partition is given."""
    p, tokens = Partition.even(97, tp.size), BATCH * SEQUENCE
    labels = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    for dtype, size in ((torch.float64, 8), (torch.bfloat16, 4)):
        logits = random(BATCH, SEQUENCE, 97, dtype=dtype)
        mine = logits[..., p.bounds[tp.rank][0] : p.bounds[tp.rank][1]].clone().requires_grad_()
        for smoothing, numbers in ((0.0, 3), (0.1, 4)):
            for partition in (p, None):
                with record(tp) as ledger:
                    vocab_parallel_cross_entropy(
                        mine, labels, tp, label_smoothing=smoothing, partition=partition
                    ).backward()
                if partition is None:
                    expected_bytes = [tp.size * 8, tp.size * (numbers + 1) * tokens * size]
                else:
                    expected_bytes = [tp.size * numbers * tokens * size]
                assert [call.bytes for call in ledger.calls] == expected_bytes
                assert {(c.op, c.phase, c.layer) for c in ledger.calls} == {
                    ("all_gather", "forward", "loss")
                }


def check_same_without_overlap(tp: ParallelGroup) -> None:
    """With and without overlap the same is sent, under autocast too."""
    sequence = Partition.even(SEQUENCE, tp.size)
    for sp in (False, True):
        for autocast in (False, True):
            sent = []
            for overlap in (True, False):
                up = ColumnParallelLinear(
                    IN, OUT, tp, bias=True, sequence_parallel=sp, sharding=Sharding(overlap=overlap)
                )
                down = RowParallelLinear(
                    OUT, IN, tp, bias=True, sequence_parallel=sp, sharding=Sharding(overlap=overlap)
                )
                options = {"sequence": sequence} if sp else {}
                x = random(BATCH, SEQUENCE, IN, dtype=torch.float32)
                if sp:
                    x = x[:, sequence.bounds[tp.rank][0] : sequence.bounds[tp.rank][1]]
                x = x.clone().requires_grad_()
                with record(tp) as ledger:
                    with torch.autocast(
                        torch.get_default_device().type, torch.bfloat16, enabled=autocast
                    ):
                        y = down(up(x, **options), **options)
                    y.sum().backward()
                sent.append(Counter(ledger.calls))
            assert sent[0] == sent[1], f"{sp=} {autocast=}: {sent}"


class Order(TorchDispatchMode):
    """Writes down matmuls, collectives and waits in the order in which they are issued."""

    NAMES: ClassVar[dict[str, str]] = {
        "aten::mm": "matmul",
        "c10d::allreduce_": "all_reduce",
        "c10d::_allgather_base_": "all_gather",
        "c10d::_reduce_scatter_base_": "reduce_scatter",
    }

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = self.NAMES.get(func._schema.name)
        if name:
            self.events.append(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching_waits(self) -> Iterator[None]:
        wait = primitives.Pending.wait

        def watched(pending: primitives.Pending) -> Tensor:
            self.events.append("wait")
            return wait(pending)

        primitives.Pending.wait = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            primitives.Pending.wait = wait  # type: ignore[method-assign]


def check_order(tp: ParallelGroup) -> None:
    """Between issuing a backward collective and waiting for it, the weight gradient is computed."""
    sequence = Partition.even(2 * tp.size, tp.size)
    for sp, keep, events in (
        (False, True, ["matmul", "all_reduce", "matmul", "wait"]),
        (True, True, ["matmul", "reduce_scatter", "matmul", "wait"]),
        (
            True,
            False,
            ["all_gather", "matmul", "reduce_scatter", "wait", "matmul", "wait"],
        ),
    ):
        layer = ColumnParallelLinear(
            IN,
            FFN,
            tp,
            bias=True,
            sequence_parallel=sp,
            sharding=Sharding(keep_gathered_input=keep),
        )
        x = torch.ones(1, 2 if sp else sequence.length, IN, requires_grad=True)
        y = layer(x)
        order = Order()
        with order.watching_waits(), order:
            y.backward(torch.ones_like(y))
        assert order.events == events, order.events


@pytest.mark.parametrize("n", [2, 3])
def test_every_layer_sends_what_its_table_says(ranks: RankPool, n: int) -> None:
    ranks(n, check_sent)
    ranks(n, check_loss)


def test_one_rank_sends_nothing(ranks: RankPool) -> None:
    ranks(1, check_nothing)


def check_nothing(tp: ParallelGroup) -> None:
    with record(tp) as ledger:
        for case in CASES:
            step(case, case.make(tp, torch.float64), tp)
    assert ledger.calls == []


def test_calls_have_their_layers_names(ranks: RankPool) -> None:
    names = {f"attention.{part}" for part in ("qkv", "output")} | {"mlp.up", "mlp.down"}
    assert ranks(2, check_names) == [names, names]


def test_nothing_is_sent_in_vain(ranks: RankPool) -> None:
    ranks(2, check_less)


def test_overlap_changes_the_order_only(ranks: RankPool) -> None:
    ranks(2, check_same_without_overlap)
    ranks(2, check_order)
