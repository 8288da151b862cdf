"""Layers alone, with partitions of every shape, against dense torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow import (
    ColumnParallelLinear,
    GateUpParallelLinear,
    LayerNorm,
    ParallelAttention,
    ParallelGroup,
    ParallelMLP,
    PositionEmbedding,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from colrow.head_partition import HeadPartition
from colrow.layers.options import RopeConfig
from colrow.partition import Partition
from colrow.sharding import Sharding
from tests.fuzz.case import Case, Fields, Kind, OneOf, World
from tests.fuzz.decoders import SHARDINGS
from tests.layers.dense import Weights, assert_close, compare, divided, random
from tests.layers.test_attention import HEAD_DIM, DenseAttention, head_norm

_HEADS = [[4, 2], [4, 4], [5, 1], [6, 3], [9, 3], [7, 7], [12, 4], [8, 2]]


def fields(ranks: int) -> Fields:
    return Fields(
        {
            "layer": OneOf(list(_LAYERS)),
            "rows": OneOf([2, 1, 3]),
            "length": OneOf([8, 7, 1, 3, 2, 16]),
            "features": OneOf([12, 8, 13, 5]),
            "out": OneOf([16, 101, 4, 7, 9]),
            "heads": OneOf(_HEADS),
            "split": OneOf([[], [2, 1, 1, 1], [1, 3, 1, 1], [1, 1, 1, 5]]),
            "bias": OneOf([True, False]),
            "sharding": OneOf(SHARDINGS),
            "uneven_sequence": OneOf([False, True]),
            "whole_input": OneOf([False, True]),
            "rope": OneOf([True, False]),
            "window": OneOf([None, 2, 3]),
            "alibi": OneOf([False, True]),
            "norms": OneOf([False, True]),
            "smoothing": OneOf([0.0, 0.2]),
            "z_loss": OneOf([0.0, 0.1]),
            "reduction": OneOf(["mean", "sum", "none"]),
            "frozen": OneOf([False, True]),
        }
    )


def run(world: World, case: Case) -> list[str]:
    tp = world.mesh().tp
    try:
        _LAYERS[case["layer"]](case, tp)
    except AssertionError as error:
        return [str(error)]
    return []


def _partition(case: Case, length: int, tp: ParallelGroup) -> Partition:
    if case["split"]:
        return Partition.ratio(length, case["split"][: tp.size])
    return Partition.even(length, tp.size)


def _sequence(case: Case, tp: ParallelGroup) -> Partition:
    if case["uneven_sequence"]:
        return Partition.ratio(case["length"], list(range(1, tp.size + 1)))
    return Partition.even(case["length"], tp.size)


def _x(case: Case, features: int) -> Tensor:
    return random(case["rows"], case["length"], features).requires_grad_()


def _sharding(case: Case) -> Sharding:
    return Sharding(**case["sharding"])


def _options(case: Case) -> dict[str, Any]:
    return {"bias": case["bias"], "sharding": _sharding(case), "dtype": torch.float64}


def _linear(weights: Weights, x: Tensor) -> Tensor:
    return F.linear(x, weights["weight"], weights.get("bias"))


def _check(
    case: Case,
    tp: ParallelGroup,
    layer: nn.Module,
    dense: Callable[[Weights, Tensor], Tensor],
    features: int,
    *,
    x: list[Partition] | None = None,
    y: list[Partition] | None = None,
    by_sequence: str = "",
    pass_sequence: bool = True,
) -> None:
    """Args: x, y: how the features are divided; by_sequence: "x" or "xy", what is by sequence."""
    inputs = _x(case, features)
    sequence = _sequence(case, tp)
    divided_x = divided(inputs, -1, *x) if x else None
    divided_y = (lambda whole: divided(whole, -1, *y)) if y else None
    if "x" in by_sequence:
        divided_x = divided(inputs, -2, sequence)
    if "y" in by_sequence:
        divided_y = lambda whole: divided(whole, -2, sequence)  # noqa: E731
    options = {"sequence": sequence} if by_sequence and pass_sequence else {}
    if case["frozen"]:
        layer.get_parameter(next(n for n, _ in layer.named_parameters())).requires_grad_(False)
    compare(
        tp,
        layer,
        dense,
        inputs,
        case["layer"],
        x_spec=divided_x,
        y_spec=divided_y,
        run=lambda given: layer(given, **options),
    )


def _column(case: Case, tp: ParallelGroup) -> None:
    partition = _partition(case, case["out"], tp)
    layer = ColumnParallelLinear(
        case["features"], case["out"], tp, partition=partition, **_options(case)
    )
    by = "x" if _sharding(case).sequence_parallel else ""
    _check(case, tp, layer, _linear, case["features"], y=[partition], by_sequence=by)


def _gathered(case: Case, tp: ParallelGroup) -> None:
    layer = ColumnParallelLinear(
        case["features"],
        case["out"],
        tp,
        partition=_partition(case, case["out"], tp),
        gather_output=True,
        bias=case["bias"],
        sharding=Sharding(overlap=_sharding(case).overlap),
        dtype=torch.float64,
    )
    _check(case, tp, layer, _linear, case["features"])


def _row(case: Case, tp: ParallelGroup) -> None:
    partition = _partition(case, case["out"], tp)
    layer = RowParallelLinear(
        case["out"],
        case["features"],
        tp,
        partition=partition,
        input_is_parallel=not case["whole_input"],
        **_options(case),
    )
    by = "y" if _sharding(case).sequence_parallel else ""
    x = None if case["whole_input"] else [partition]
    _check(case, tp, layer, _linear, case["out"], x=x, by_sequence=by)


def _qkv(case: Case, tp: ParallelGroup) -> None:
    heads = _heads(case, tp)
    layer = QKVParallelLinear(case["features"], heads, 4, tp, **_options(case))
    key_value = heads.key_value.scaled(4)
    y = [heads.query.scaled(4), key_value, key_value]
    by = "x" if _sharding(case).sequence_parallel else ""
    _check(case, tp, layer, _linear, case["features"], y=y, by_sequence=by)


def _gate_up(case: Case, tp: ParallelGroup) -> None:
    partition = _partition(case, case["out"], tp)
    layer = GateUpParallelLinear(case["features"], partition, tp, **_options(case))
    by = "x" if _sharding(case).sequence_parallel else ""
    _check(case, tp, layer, _linear, case["features"], y=[partition, partition], by_sequence=by)


def _mlp(case: Case, tp: ParallelGroup) -> None:
    activation = "silu" if case["rope"] else "gelu"
    layer = ParallelMLP(
        case["features"],
        case["out"],
        tp,
        activation=activation,
        gated=case["norms"],
        partition=_partition(case, case["out"], tp),
        **_options(case),
    )
    by = "xy" if _sharding(case).sequence_parallel else ""

    def dense(w: Weights, x: Tensor) -> Tensor:
        hidden = F.linear(x, w["up.weight"], w.get("up.bias"))
        function = F.silu if activation == "silu" else F.gelu
        if case["norms"]:
            gate, up = hidden.chunk(2, -1)
            hidden = function(gate) * up
        else:
            hidden = function(hidden)
        return F.linear(hidden, w["down.weight"], w.get("down.bias"))

    _check(case, tp, layer, dense, case["features"], by_sequence=by)


def _attention(case: Case, tp: ParallelGroup) -> None:
    query, key_value = case["heads"]
    rope = RopeConfig(theta=100.0, dims=HEAD_DIM) if case["rope"] else None
    norms = 1e-5 if case["norms"] else None
    layer = ParallelAttention(
        case["features"],
        _heads(case, tp),
        HEAD_DIM,
        tp,
        rope=rope,
        alibi=case["alibi"],
        qkv_bias=case["bias"],
        output_bias=case["bias"],
        query_norm=head_norm(norms),
        key_norm=head_norm(norms),
        window=case["window"],
        sharding=_sharding(case),
        dtype=torch.float64,
    )
    dense = DenseAttention(query, key_value, rope, case["alibi"], case["window"], norms)
    by = "xy" if _sharding(case).sequence_parallel else ""
    _check(case, tp, layer, dense, case["features"], by_sequence=by)


def _heads(case: Case, tp: ParallelGroup) -> HeadPartition:
    weights = case["split"][: tp.size] if case["split"] else None
    return HeadPartition.create(*case["heads"], tp.size, weights=weights)


def _norm(case: Case, tp: ParallelGroup) -> None:
    applied = "shard" if _sharding(case).sequence_parallel else "all"
    features = case["features"]
    options: dict[str, Any] = {"eps": 1e-5, "applied_to": applied, "dtype": torch.float64}
    by = "xy" if _sharding(case).sequence_parallel else ""
    if case["norms"]:
        layer: nn.Module = LayerNorm(features, tp, bias=case["bias"], **options)

        def dense(w: Weights, x: Tensor) -> Tensor:
            return F.layer_norm(x, (features,), w["weight"], w.get("bias"), 1e-5)
    else:
        layer = RMSNorm(features, tp, **options)

        def dense(w: Weights, x: Tensor) -> Tensor:
            return F.rms_norm(x, (features,), w["weight"], 1e-5)

    _check(case, tp, layer, dense, features, by_sequence=by, pass_sequence=False)


def _embedding(case: Case, tp: ParallelGroup) -> None:
    padding = 2 if case["norms"] else None
    layer = VocabParallelEmbedding(
        case["out"],
        case["features"],
        tp,
        partition=_partition(case, case["out"], tp),
        padding_idx=padding,
        sharding=_sharding(case),
        dtype=torch.float64,
    )
    _lookup(case, tp, layer, case["out"], padding)


def _positions(case: Case, tp: ParallelGroup) -> None:
    layer = PositionEmbedding(
        23, case["features"], tp, sharding=_sharding(case), dtype=torch.float64
    )
    _lookup(case, tp, layer, 23, None)


def _lookup(
    case: Case, tp: ParallelGroup, layer: nn.Module, rows: int, padding: int | None
) -> None:
    source = torch.Generator().manual_seed(4)
    ids = torch.randint(0, rows, (case["rows"], case["length"]), generator=source)
    sequence = _sequence(case, tp)
    parallel = _sharding(case).sequence_parallel
    compare(
        tp,
        layer,
        lambda w, i: F.embedding(i, w["weight"], padding_idx=padding),
        ids,
        case["layer"],
        y_spec=(lambda y: divided(y, -2, sequence)) if parallel else None,
        run=lambda i: layer(i, **({"sequence": sequence} if parallel else {})),
        result_dtype=torch.float64,
    )


def _loss(case: Case, tp: ParallelGroup) -> None:
    size = case["out"]
    partition = _partition(case, size, tp)
    whole = _x(case, size)
    source = torch.Generator().manual_seed(4)
    labels = torch.randint(0, size, whole.shape[:2], generator=source)
    if case["norms"]:
        labels[0, ::2] = -100
    counts = labels != -100
    each = F.cross_entropy(
        whole.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=case["smoothing"]
    ).view_as(labels)
    each = each + case["z_loss"] * whole.logsumexp(-1).square() * counts
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / counts.sum()}[
        case["reduction"]
    ]
    start, stop = partition.bounds[tp.rank]
    local = whole.detach()[..., start:stop].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(
        local,
        labels,
        tp,
        label_smoothing=case["smoothing"],
        z_loss=case["z_loss"],
        reduction=case["reduction"],
        partition=partition,
    )
    grad = torch.linspace(0.5, 1.5, max(1, expected.numel())).double().view_as(expected)
    expected.backward(grad)
    loss.backward(grad)
    assert whole.grad is not None and local.grad is not None
    if bool(expected.isnan().any()):
        assert bool(loss.isnan().any()), "the loss of no token is a number"
        return
    assert_close(loss, expected, 1e-11, "loss")
    assert_close(local.grad, whole.grad[..., start:stop], 1e-11, "gradient of the logits")


_LAYERS: dict[str, Callable[[Case, ParallelGroup], None]] = {
    "column": _column,
    "gathered": _gathered,
    "row": _row,
    "qkv": _qkv,
    "gate_up": _gate_up,
    "mlp": _mlp,
    "attention": _attention,
    "norm": _norm,
    "embedding": _embedding,
    "positions": _positions,
    "loss": _loss,
}
LAYERS = Kind("layers", fields, run, weight=2)
