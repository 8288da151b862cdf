from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow import ColumnParallelLinear, ParallelGroup, Partition, RowParallelLinear
from colrow.comm.ledger import record
from colrow.layers.chunks import chunk_count, sequence_chunks
from tests.layers.dense import Weights, compare, divided, raises, random
from tests.ranks import RankPool

BATCH, IN, OUT = 2, 12, 10
FP64 = torch.float64


def dense(weights: Weights, x: Tensor) -> Tensor:
    return F.linear(x, weights["weight"], weights.get("bias"))


def check(tp: ParallelGroup) -> None:
    features = Partition.even(OUT, tp.size)
    inputs = Partition.even(IN, tp.size)
    uneven = Partition.from_sizes([2 + 3 * rank for rank in range(tp.size)])
    for sequence in (Partition.even(4 * tp.size + 1, tp.size), uneven):
        shape = (BATCH, sequence.length, IN)
        for bias in (True, False):
            row = RowParallelLinear(IN, OUT, tp, bias=bias, chunk_bytes=64, dtype=FP64)
            with record(tp) as ledger:
                compare(
                    tp,
                    row,
                    dense,
                    random(*shape).requires_grad_(),
                    f"{row} of {sequence}",
                    x_spec=divided(random(*shape), -1, inputs),
                )
            assert any(call.bytes < BATCH * sequence.length * OUT * 8 for call in ledger.calls)
            split = RowParallelLinear(
                IN, OUT, tp, bias=bias, sequence_parallel=True, chunk_bytes=64, dtype=FP64
            )
            compare(
                tp,
                split,
                dense,
                random(*shape).requires_grad_(),
                f"{split} of {sequence}",
                x_spec=divided(random(*shape), -1, inputs),
                y_spec=lambda y, s=sequence: divided(y, -2, s),
                run=lambda x, layer=split, s=sequence: layer(x, sequence=s),
            )
            for keep in (True, False):
                column = ColumnParallelLinear(
                    IN,
                    OUT,
                    tp,
                    bias=bias,
                    sequence_parallel=True,
                    keep_gathered_input=keep,
                    chunk_bytes=64,
                    dtype=FP64,
                )
                compare(
                    tp,
                    column,
                    dense,
                    random(*shape).requires_grad_(),
                    f"{column} of {sequence} keep={keep}",
                    x_spec=divided(random(*shape), -2, sequence),
                    y_spec=lambda y: divided(y, -1, features),
                    run=lambda x, layer=column, s=sequence: layer(x, sequence=s),
                )


@pytest.mark.parametrize("n", [2, 3])
def test_chunks_compute_what_whole_messages_do(ranks: RankPool, n: int) -> None:
    ranks(n, check)


def test_how_a_message_is_cut() -> None:
    assert chunk_count(4096, 100, None) == 1
    assert chunk_count(4096, 100, 4096) == chunk_count(4096, 100, 4097) == 1
    assert chunk_count(4096, 100, 2048) == 2
    assert chunk_count(1 << 20, 3, 1) == 3
    assert chunk_count(1 << 20, 100, 1) == 4
    cut = sequence_chunks(Partition.from_sizes([3, 2]), 2)
    assert cut == [((0, 2), (3, 4)), ((2, 3), (4, 5))]


def test_bad_sizes() -> None:
    tp = ParallelGroup.single()
    with raises(ValueError, "chunk_bytes=0", "at least 1"):
        RowParallelLinear(IN, OUT, tp, bias=False, chunk_bytes=0)
    with raises(ValueError, "chunk_bytes=64", "overlap=True"):
        ColumnParallelLinear(IN, OUT, tp, bias=False, chunk_bytes=64, overlap=False)
