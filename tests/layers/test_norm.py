from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from colrow import LayerNorm, ParallelGroup, Partition, RMSNorm
from tests.layers.dense import Weights, compare, divided, random
from tests.ranks import RankPool

SIZE, EPS = 12, 1e-5


def dense_rms(weights: Weights, x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (SIZE,), weights["weight"], EPS)


def dense_layer_norm(weights: Weights, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return normed * weights["weight"] + weights.get("bias", torch.zeros(()))


def check(tp: ParallelGroup) -> None:
    sequence = Partition.even(7, tp.size)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for frozen in (None, "weight"):
            for applied_to in ("all", "shard"):
                layers: list[tuple[torch.nn.Module, Callable[[Weights, Tensor], Tensor]]] = [
                    (RMSNorm(SIZE, tp, eps=EPS, applied_to=applied_to, dtype=dtype), dense_rms),
                    (
                        LayerNorm(SIZE, tp, eps=EPS, applied_to=applied_to, dtype=dtype),
                        dense_layer_norm,
                    ),
                    (
                        LayerNorm(
                            SIZE, tp, eps=EPS, applied_to=applied_to, bias=False, dtype=dtype
                        ),
                        dense_layer_norm,
                    ),
                ]
                for layer, dense in layers:
                    if frozen:
                        layer.get_parameter(frozen).requires_grad_(False)
                    x = (3 * random(2, 7, SIZE, dtype=dtype) + 1).requires_grad_()
                    split = divided(x, 1, sequence) if applied_to == "shard" else None
                    compare(
                        tp,
                        layer,
                        dense,
                        x,
                        f"{layer} {dtype}",
                        x_spec=split,
                        y_spec=(lambda y: divided(y, 1, sequence)) if split else None,
                    )


def check_narrow_input(tp: ParallelGroup) -> None:
    """The result has the input's dtype also when the parameters are wider."""
    for kind, dense in ((RMSNorm, dense_rms), (LayerNorm, dense_layer_norm)):
        layer = kind(SIZE, tp, eps=EPS)
        compare(tp, layer, dense, random(2, 7, SIZE, dtype=torch.bfloat16).requires_grad_(), "bf16")


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_against_dense(ranks: RankPool, n: int) -> None:
    ranks(n, check)
    ranks(n, check_narrow_input)


def test_the_statistics_of_narrow_inputs_are_wide() -> None:
    """Squares of fp16 numbers overflow fp16; their root mean square does not."""
    x = torch.full((1, SIZE), 3e4, dtype=torch.float16)
    assert torch.equal(RMSNorm(SIZE, ParallelGroup.single(), eps=EPS, dtype=x.dtype)(x), x / 3e4)
