from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow import ParallelGroup, ParallelMLP, Partition
from colrow.sharding import Sharding
from tests.layers.dense import Weights, compare, divided, raises, random
from tests.ranks import RankPool

BATCH, SEQUENCE, HIDDEN, FFN = 2, 7, 12, 101


def bloom_gelu(x: Tensor) -> Tensor:
    """transformers' bloom_gelu_forward."""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_bloom": bloom_gelu,
    "relu": lambda x: x.clamp(min=0),
}


def dense_mlp(activation: str, gated: bool) -> Callable[[Weights, Tensor], Tensor]:
    def run(weights: Weights, x: Tensor) -> Tensor:
        hidden = F.linear(x, weights["up.weight"], weights.get("up.bias"))
        if gated:
            gate, up = hidden[..., :FFN], hidden[..., FFN:]
            hidden = FUNCTIONS[activation](gate) * up
        else:
            hidden = FUNCTIONS[activation](hidden)
        return F.linear(hidden, weights["down.weight"], weights.get("down.bias"))

    return run


def check(tp: ParallelGroup) -> None:
    sequence = Partition.even(SEQUENCE, tp.size)
    uneven = Partition.ratio(FFN, [1 + rank for rank in range(tp.size)])
    for activation in FUNCTIONS:
        for gated in (True, False):
            for sp in (True, False):
                layer = ParallelMLP(
                    HIDDEN,
                    FFN,
                    tp,
                    activation=activation,  # type: ignore[arg-type]
                    gated=gated,
                    bias=not gated,
                    partition=uneven if sp else None,
                    sequence_parallel=sp,
                    sharding=Sharding(keep_gathered_input=gated),
                    dtype=torch.float64,
                )
                x = random(BATCH, SEQUENCE, HIDDEN).requires_grad_()
                compare(
                    tp,
                    layer,
                    dense_mlp(activation, gated),
                    x,
                    f"{activation} {gated=} {sp=}",
                    x_spec=divided(x, 1, sequence) if sp else None,
                    y_spec=(lambda y: divided(y, 1, sequence)) if sp else None,
                    # Without the division, which is not even, the ranks tell each other.
                    run=lambda x, a=layer, g=gated: a(x, sequence=None if g else sequence),
                )


def check_refusals(tp: ParallelGroup) -> None:
    with raises(ValueError, "activation='swish'", "'silu'"):
        ParallelMLP(HIDDEN, FFN, tp, activation="swish")  # type: ignore[arg-type]
    with raises(ValueError, "=101", "divides 100"):
        ParallelMLP(HIDDEN, FFN, tp, partition=Partition.even(100, tp.size))
    with raises(ValueError, f"over {tp.size + 1} ranks"):
        ParallelMLP(HIDDEN, FFN, tp, partition=Partition.even(FFN, tp.size + 1))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_against_dense(ranks: RankPool, n: int) -> None:
    ranks(n, check)


def test_what_does_not_fit_is_refused(ranks: RankPool) -> None:
    ranks(2, check_refusals)
