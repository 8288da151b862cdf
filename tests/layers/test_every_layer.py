"""What holds for every layer: any part of it may be frozen, and it may be used more than once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from colrow import ParallelGroup
from tests.layers.catalogue import CASES
from tests.ranks import RankPool

FP64 = torch.float64


def check_frozen(tp: ParallelGroup) -> None:
    """Whatever is frozen, the gradients of the rest are right, and what is frozen gets none."""
    for case in CASES:
        for frozen in ("weight", "bias", "attention", "norm", ""):
            for x_grad in (True, False):
                layer = case.make(tp, FP64)
                for name, parameter in layer.named_parameters():
                    parameter.requires_grad_(frozen not in name)  # "" is in every name
                case.compare(tp, layer, FP64, x_grad=x_grad)


class Twice(nn.Module):
    """Parameters of one layer, used twice in one forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **options: object) -> Tensor:
        scaled = 2 * x if x.is_floating_point() else x
        result: Tensor = self.layer(x, **options) + 3 * self.layer(scaled, **options)
        return result


def check_twice(tp: ParallelGroup) -> None:
    for case in CASES:
        layer = case.make(tp, FP64)

        def dense(weights: dict[str, Tensor], x: Tensor, case: object = case) -> Tensor:
            scaled = 2 * x if x.is_floating_point() else x
            return case.dense(weights, x) + 3 * case.dense(weights, scaled)  # type: ignore[attr-defined]

        case.compare(tp, layer, FP64, call=Twice(layer), dense=dense)


@pytest.mark.parametrize("n", [2, 3])
def test_frozen_parameters(ranks: RankPool, n: int) -> None:
    ranks(n, check_frozen)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_used_twice_in_one_forward_pass(ranks: RankPool, n: int) -> None:
    ranks(n, check_twice)
