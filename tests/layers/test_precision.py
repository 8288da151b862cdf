"""Every layer in every dtype and under autocast, against the dense layer in fp64."""

from __future__ import annotations

import pytest
import torch

from colrow import ParallelGroup
from tests.layers.catalogue import CASES
from tests.layers.dense import raises
from tests.ranks import RankPool

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtypes(tp: ParallelGroup) -> None:
    for case in CASES:
        for dtype in DTYPES:
            # One device's own bf16 error in a whole block's gradients is up to 2.1e-2.
            tolerance = 4e-2 if "block" in case.name and dtype != torch.float32 else None
            case.compare(tp, case.make(tp, dtype), dtype, tolerance=tolerance)


def check_autocast(tp: ParallelGroup) -> None:
    """Parameters and their gradients stay fp32; what nn.Linear would return in bf16, these do."""
    for case in CASES:
        layer = case.make(tp, torch.float32)

        def call(*args: object, layer: torch.nn.Module = layer, **options: object) -> torch.Tensor:
            with torch.autocast(torch.get_default_device().type, torch.bfloat16):
                result: torch.Tensor = layer(*args, **options)
            return result

        case.compare(
            tp,
            layer,
            torch.float32,
            call=call,
            result_dtype=torch.bfloat16 if case.matmul else torch.float32,
            tolerance=4e-2 if "block" in case.name else 2e-2,
        )


def check_autocast_leaves_fp64(tp: ParallelGroup) -> None:
    """Autocast narrows fp32, not fp64, in torch's layers; so here."""
    for case in CASES:
        layer = case.make(tp, torch.float64)

        def call(*args: object, layer: torch.nn.Module = layer, **options: object) -> torch.Tensor:
            with torch.autocast(torch.get_default_device().type, torch.bfloat16):
                result: torch.Tensor = layer(*args, **options)
            return result

        case.compare(tp, layer, torch.float64, call=call)


def check_second_derivatives(tp: ParallelGroup) -> None:
    """Refused, since what backward sends has no derivative."""
    for case in CASES:
        if case.features is None or case.takes_sequence or "row" in case.name:
            continue
        layer = case.make(tp, torch.float64)
        x = case.input(torch.float64)
        y = layer(x).square().sum()
        gradients = torch.autograd.grad(y, [x, *layer.parameters()], create_graph=True)
        with raises(RuntimeError, "once_differentiable"):
            sum(g.square().sum() for g in gradients).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_dtypes(ranks: RankPool, n: int) -> None:
    ranks(n, check_dtypes)


@pytest.mark.parametrize("n", [1, 2])
def test_autocast(ranks: RankPool, n: int) -> None:
    ranks(n, check_autocast)
    ranks(n, check_autocast_leaves_fp64)


def test_second_derivatives_are_refused(ranks: RankPool) -> None:
    ranks(2, check_second_derivatives)
