"""A split model that does not give what the whole one gives is not accepted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import colrow
from colrow.comm.group import ParallelGroup
from colrow.inplace import check
from colrow.inplace.apply.applier import Applier
from colrow.inplace.apply.layers import GatheredMixin
from colrow.inplace.apply.record import record_of
from tests.inplace.test_parallelize import OwnModel, mesh_of
from tests.ranks import RankPool

IDS = torch.arange(12).view(2, 6) % 7


def check_restored(tp: ParallelGroup) -> None:
    torch.manual_seed(0)
    model = OwnModel().double()
    weights = {n: p for n, p in model.named_parameters()}
    classes = {n: type(m) for n, m in model.named_modules()}
    expected = model(IDS)
    right: Callable[..., None] = Applier.split

    def wrong(self: Applier, *how: Any) -> None:
        right(self, *how)
        with torch.no_grad():
            model.get_parameter("both.weight").mul_(1.001)

    Applier.split = wrong  # type: ignore[method-assign]
    try:
        with pytest.raises(ValueError, match="does not give what the whole model gives"):
            colrow.parallelize(model, mesh_of(tp), example_inputs={"ids": IDS})
    finally:
        Applier.split = right  # type: ignore[method-assign]
    assert record_of(model) is None
    assert all(p is weights[n] for n, p in model.named_parameters())
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert vars(model)["heads"] == 5
    torch.testing.assert_close(model(IDS), expected, rtol=1e-2, atol=1e-2)


def test_a_model_that_comes_out_wrong_is_put_back(ranks: RankPool) -> None:
    ranks(2, check_restored)


def check_split_otherwise(tp: ParallelGroup) -> list[str]:
    torch.manual_seed(0)
    model = OwnModel().double()
    expected = model(IDS)
    right: Callable[..., None] = Applier.split_group

    def wrong(self: Applier, name: str, proof: Any) -> None:
        right(self, name, proof)
        with torch.no_grad():
            model.get_parameter("both.weight").mul_(1.001)

    Applier.split_group = wrong  # type: ignore[method-assign]
    try:
        colrow.parallelize(model, mesh_of(tp), example_inputs={"ids": IDS})
    finally:
        Applier.split_group = right  # type: ignore[method-assign]
    torch.testing.assert_close(model(IDS), expected, rtol=1e-12, atol=1e-12)
    return [n for n, m in model.named_modules() if isinstance(m, GatheredMixin)]


def test_pairs_with_which_the_model_is_wrong_are_split_otherwise(ranks: RankPool) -> None:
    assert "both" in ranks(2, check_split_otherwise)[0]


def test_limits_follow_the_dtype() -> None:
    assert check.limit_of(OwnModel().double()) < check.limit_of(OwnModel()) < 0.01
