from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow import (
    ColumnParallelLinear,
    FusedColumnParallelLinear,
    GateUpParallelLinear,
    HeadPartition,
    ParallelGroup,
    Partition,
    QKVParallelLinear,
    RowParallelLinear,
)
from colrow.sharding import Sharding
from tests.layers.dense import (
    Weights,
    assert_close,
    compare,
    divided,
    place,
    raises,
    random,
    whole_weights,
)
from tests.ranks import RankPool

BATCH, SEQUENCE, IN, OUT = 2, 7, 12, 101
FP64 = torch.float64


def dense(weights: Weights, x: Tensor) -> Tensor:
    return F.linear(x, weights["weight"], weights.get("bias"))


def check_column(tp: ParallelGroup) -> None:
    uneven = Partition.from_sizes([OUT - 2 * (tp.size - 1), *[2] * (tp.size - 1)])
    for bias in (True, False):
        for gather_output in (True, False):
            for partition in (None, uneven):
                p = partition or Partition.even(OUT, tp.size)
                for overlap in (True, False):
                    layer = ColumnParallelLinear(
                        IN,
                        OUT,
                        tp,
                        bias=bias,
                        gather_output=gather_output,
                        partition=partition,
                        sharding=Sharding(overlap=overlap),
                        dtype=FP64,
                    )
                    for shape in ((BATCH, SEQUENCE, IN), (SEQUENCE, IN), (IN,)):
                        compare(
                            tp,
                            layer,
                            dense,
                            random(*shape).requires_grad_(),
                            f"{layer} of {shape} overlap={overlap}",
                            y_spec=None if gather_output else lambda y, p=p: divided(y, -1, p),
                        )


def check_column_sequence_parallel(tp: ParallelGroup) -> None:
    features = Partition.even(OUT, tp.size)
    for sequence in sequences(tp.size):
        for keep, overlap in ((True, True), (True, False), (False, True)):
            for gather_output in (True, False):
                layer = ColumnParallelLinear(
                    IN,
                    OUT,
                    tp,
                    bias=True,
                    gather_output=gather_output,
                    sequence_parallel=True,
                    sharding=Sharding(keep_gathered_input=keep, overlap=overlap),
                    dtype=FP64,
                )
                for batch in ((BATCH,), ()):
                    x = random(*batch, sequence.length, IN).requires_grad_()
                    compare(
                        tp,
                        layer,
                        dense,
                        x,
                        f"{layer} of {sequence} keep={keep} overlap={overlap}",
                        x_spec=divided(x, -2, sequence),
                        y_spec=None if gather_output else lambda y: divided(y, -1, features),
                        run=with_sequence(layer, sequence),
                    )


def check_row(tp: ParallelGroup) -> None:
    uneven = Partition.from_sizes([OUT - 2 * (tp.size - 1), *[2] * (tp.size - 1)])
    for bias in (True, False):
        for parallel in (True, False):
            for p in (Partition.even(OUT, tp.size), uneven):
                for overlap in (True, False):
                    layer = RowParallelLinear(
                        OUT,
                        IN,
                        tp,
                        bias=bias,
                        input_is_parallel=parallel,
                        partition=p,
                        sharding=Sharding(overlap=overlap),
                        dtype=FP64,
                    )
                    x = random(BATCH, SEQUENCE, OUT).requires_grad_()
                    spec = divided(x, -1, p) if parallel else None
                    what = f"{layer} overlap={overlap} parallel={parallel}"
                    compare(tp, layer, dense, x, what, x_spec=spec)


def check_row_sequence_parallel(tp: ParallelGroup) -> None:
    p = Partition.even(OUT, tp.size)
    for sequence in sequences(tp.size):
        for parallel in (True, False):
            for overlap in (True, False):
                layer = RowParallelLinear(
                    OUT,
                    IN,
                    tp,
                    bias=True,
                    input_is_parallel=parallel,
                    sequence_parallel=True,
                    sharding=Sharding(overlap=overlap),
                    dtype=FP64,
                )
                x = random(BATCH, sequence.length, OUT).requires_grad_()
                compare(
                    tp,
                    layer,
                    dense,
                    x,
                    f"{layer} of {sequence} overlap={overlap} parallel={parallel}",
                    x_spec=divided(x, -1, p) if parallel else None,
                    y_spec=lambda y, s=sequence: divided(y, -2, s),
                    run=with_sequence(layer, sequence),
                )


def sequences(n: int) -> list[Partition]:
    """Lengths that divide, that do not, and that leave ranks without a position."""
    return [
        Partition.even(2 * n, n),
        Partition.even(SEQUENCE, n),
        Partition.from_sizes([*[0] * (n - 1), SEQUENCE]),
    ]


def with_sequence(layer: nn.Module, sequence: Partition) -> Callable[[Tensor], Tensor]:
    """Passes the division, except where it is the default."""
    default = sequence == Partition.even(sequence.length, sequence.parts)
    return layer if default else lambda x: layer(x, sequence=sequence)


def check_fused(tp: ParallelGroup) -> None:
    n = tp.size
    shared_kv = HeadPartition.create(4, 2, n).key_value
    blocks = {
        "disjoint": [Partition.even(9, n), Partition.even(5, n)],
        "KV heads alone": [shared_kv.scaled(3)],
        "replicated": [Partition.replicated(4, n), Partition.even(6, n)],
        "empty": [Partition.from_sizes([0] * (n - 1) + [3]), Partition.even(7, n)],
    }
    sequence = Partition.even(SEQUENCE, n)
    for what, parts in blocks.items():
        for sp in (False, True):
            layer = FusedColumnParallelLinear(
                IN, parts, tp, bias=True, sequence_parallel=sp, dtype=FP64
            )
            x = random(BATCH, SEQUENCE, IN).requires_grad_()
            compare(
                tp,
                layer,
                dense,
                x,
                f"{what} sp={sp}",
                x_spec=divided(x, -2, sequence) if sp else None,
                y_spec=lambda y, parts=parts: divided(y, -1, *parts),
                run=lambda x, layer=layer, sp=sp: layer(x, sequence=sequence if sp else None),
            )
    partition = Partition.even(OUT, n)
    gate_up = GateUpParallelLinear(IN, partition, tp, bias=True, dtype=FP64)
    x = random(SEQUENCE, IN).requires_grad_()
    compare(
        tp, gate_up, dense, x, "gate, up", y_spec=lambda y: divided(y, -1, partition, partition)
    )


def check_qkv(tp: ParallelGroup) -> None:
    head_dim = 4
    for counts in ((4, 4), (5, 1), (8, 2), (9, 3), (5, 5), (4, 2)):
        heads = HeadPartition.create(*counts, tp.size)
        q, kv = heads.query.scaled(head_dim), heads.key_value.scaled(head_dim)
        for bias in (True, False):
            layer = QKVParallelLinear(IN, heads, head_dim, tp, bias=bias, dtype=FP64)
            compare(
                tp,
                layer,
                dense,
                random(BATCH, SEQUENCE, IN).requires_grad_(),
                f"{counts} {layer}",
                y_spec=lambda y, q=q, kv=kv: divided(y, -1, q, kv, kv),
            )


def check_bias_counts_once(tp: ParallelGroup) -> None:
    """With weights of zero only the bias is left, whatever the number of ranks."""
    for sp in (False, True):
        row = RowParallelLinear(8, 3, tp, bias=True, sequence_parallel=sp)
        assert row.bias is not None
        with torch.no_grad():
            row.weight.zero_()
            row.bias.copy_(torch.tensor([1.0, 2.0, 4.0]))
        y = row(random(4, row.partition.size(tp.rank), dtype=torch.float32))
        assert torch.equal(y, torch.tensor([[1.0, 2.0, 4.0]]).expand_as(y))
        y.sum().backward()
        assert row.bias.grad is not None and row.bias.grad.tolist() == [4.0, 4.0, 4.0]


def check_exact(tp: ParallelGroup) -> None:
    """0/1-valued matmuls have no rounding: every dtype gives the same whole numbers."""
    ones = (random(5, 24) > 0).double()
    up, down = (random(40, 24, seed=2) > 0).double(), (random(24, 40, seed=3) > 0).double()
    expected = ones @ up.T @ down.T
    for dtype in (torch.float64, torch.float32):
        column = ColumnParallelLinear(24, 40, tp, bias=False, dtype=dtype)
        row = RowParallelLinear(40, 24, tp, bias=False, dtype=dtype)
        place(column, {"weight": up}, tp.rank)
        place(row, {"weight": down}, tp.rank)
        x = ones.to(dtype, copy=True).requires_grad_()
        y = row(column(x))
        y.backward(ones.to(dtype))
        assert torch.equal(y.double(), expected)
        assert x.grad is not None and torch.equal(x.grad.double(), ones @ down @ up)


def check_accumulation(tp: ParallelGroup) -> None:
    """Two backward calls add up; so does one layer that is used twice in one forward pass."""
    heads = HeadPartition.create(9, 3, tp.size)
    qkv = QKVParallelLinear(IN, heads, 4, tp, bias=True, dtype=FP64)
    row = RowParallelLinear(OUT, OUT, tp, bias=True, input_is_parallel=False, dtype=FP64)
    for layer, size in ((qkv, IN), (row, OUT)):
        weights = whole_weights(layer)
        place(layer, weights, tp.rank)
        once = [random(3, size, seed=seed) for seed in (5, 6)]
        separate = []
        for x in once:
            layer.zero_grad()
            layer(x).square().sum().backward()
            separate.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
        layer.zero_grad()
        for x in once:
            layer(x).square().sum().backward()
        for p, a, b in zip(layer.parameters(), *separate, strict=True):
            assert p.grad is not None
            assert_close(p.grad, a + b, 1e-14, "accumulated")
        layer.zero_grad()
        (layer(once[0]).square().sum() + layer(once[1]).square().sum()).backward()
        for p, a, b in zip(layer.parameters(), *separate, strict=True):
            assert p.grad is not None
            assert_close(p.grad, a + b, 1e-14, "used twice")
    x = random(3, OUT).requires_grad_()
    compare(tp, row, lambda w, x: dense(w, dense(w, x)), x, "row of row", run=lambda x: row(row(x)))


def check_refusals(tp: ParallelGroup) -> None:
    n = tp.size
    x = torch.zeros(2, 4, 12)
    row = RowParallelLinear(12, 5, tp, bias=True, layer="blocks.0.mlp.down")
    mine = row.partition.size(tp.rank)
    with raises(ValueError, "blocks.0.mlp.down", f"rank's {mine} of 12", "input_is_parallel=False"):
        row(x)
    with raises(ValueError, "got a last dimension of 5", "divided as the layer's weight"):
        row(x[..., :5])
    whole = RowParallelLinear(12, 5, tp, bias=True, input_is_parallel=False)
    with raises(ValueError, "RowParallelLinear expects an input with 12 features", "(2, 4, 11)"):
        whole(x[..., :11])
    column = ColumnParallelLinear(12, 5, tp, bias=True, layer="up")
    with raises(ValueError, "up (ColumnParallelLinear)", "12 features", "(2, 4, 13)"):
        column(torch.zeros(2, 4, 13))
    other = Partition.even(12, n + 1)
    for make in (
        lambda: ColumnParallelLinear(4, 12, tp, bias=True, partition=other),
        lambda: RowParallelLinear(12, 4, tp, bias=True, partition=other),
        lambda: FusedColumnParallelLinear(4, [Partition.even(4, n), other], tp, bias=True),
    ):
        with raises(ValueError, f"over {n + 1} ranks", f"tp group of {n}"):
            make()
    with raises(ValueError, "overlap=False and keep_gathered_input=False exclude each other"):
        ColumnParallelLinear(
            12, 5, tp, bias=True, sharding=Sharding(True, keep_gathered_input=False, overlap=False)
        )
    with raises(ValueError, "in_features=12", "divides 11"):
        RowParallelLinear(12, 4, tp, bias=True, partition=Partition.even(11, n))
    with raises(ValueError, "out_features=12", "divides 11"):
        ColumnParallelLinear(4, 12, tp, bias=True, partition=Partition.even(11, n))
    overlapping = Partition.replicated(12, n)
    with raises(ValueError, "side by side"):
        RowParallelLinear(12, 4, tp, bias=True, partition=overlapping)
    with raises(ValueError, "side by side"):
        ColumnParallelLinear(4, 12, tp, bias=True, partition=overlapping, gather_output=True)
    sequence = ColumnParallelLinear(12, 5, tp, bias=True, sequence_parallel=True)
    with raises(ValueError, f"over {n + 1} ranks", f"tp group of {n}"):
        sequence(x, sequence=Partition.even(4 * (n + 1), n + 1))
    with raises(ValueError, f"should be {3 - tp.rank}, not 4"):
        sequence(x, sequence=Partition.from_sizes([3 - rank for rank in range(n)]))


def check_repr(tp: ParallelGroup) -> list[str]:
    column = ColumnParallelLinear(4, 5, tp, bias=False, sequence_parallel=True)
    return [repr(column), repr(RowParallelLinear(5, 4, tp, bias=True))]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_column(ranks: RankPool, n: int) -> None:
    ranks(n, check_column)
    ranks(n, check_column_sequence_parallel)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_row(ranks: RankPool, n: int) -> None:
    ranks(n, check_row)
    ranks(n, check_row_sequence_parallel)
    ranks(n, check_bias_counts_once)
    ranks(n, check_exact)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_fused(ranks: RankPool, n: int) -> None:
    ranks(n, check_fused)
    ranks(n, check_qkv)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_gradients_accumulate(ranks: RankPool, n: int) -> None:
    ranks(n, check_accumulation)


def test_what_does_not_fit_is_refused(ranks: RankPool) -> None:
    ranks(2, check_refusals)


def test_repr_shows_rank_and_shapes(ranks: RankPool) -> None:
    assert ranks(2, check_repr) == [
        [
            "ColumnParallelLinear(weight=[5, 4], local=[3, 4], tp_rank=0/2, bias=False, "
            "sequence_parallel=True)",
            "RowParallelLinear(weight=[4, 5], local=[4, 3], tp_rank=0/2, bias=True)",
        ],
        [
            "ColumnParallelLinear(weight=[5, 4], local=[2, 4], tp_rank=1/2, bias=False, "
            "sequence_parallel=True)",
            "RowParallelLinear(weight=[4, 5], local=[4, 2], tp_rank=1/2, bias=True)",
        ],
    ]
