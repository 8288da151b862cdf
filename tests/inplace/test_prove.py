"""What is not the whole is not accepted: by the proof, and by the check of the split model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import colrow
from colrow.comm.group import ParallelGroup
from colrow.inplace import check
from colrow.inplace.api import look
from colrow.inplace.apply import Applier
from colrow.inplace.calls import ModuleCall
from colrow.inplace.prove import NotProvenError, prove
from colrow.inplace.record import record_of
from colrow.inplace.search import Group
from colrow.inplace.unit import Unit
from colrow.inplace.whole_results import GatheredMixin
from tests.inplace.test_parallelize import OwnModel, mesh_of
from tests.ranks import RankPool

IDS = torch.arange(12).view(2, 6) % 7


@pytest.fixture(scope="module")
def unit() -> Unit:
    torch.manual_seed(0)
    return Unit.of("", OwnModel(), ModuleCall((IDS,), {}))


def found_group(layer: str) -> Group:
    torch.manual_seed(0)
    (proofs,) = look(OwnModel(), 2, "auto", {"ids": IDS}).inference.proofs.values()
    return next(proof.group for proof in proofs if layer in proof.group.columns)


def swapped(group: Group, layer: str, rank: int) -> None:
    """The rank's first row becomes one of another rank's."""
    rows = group.columns[layer]
    taken = min({*range(max(map(max, rows)) + 1)} - {*rows[rank]})
    rows[rank] = sorted([*rows[rank][1:], taken])


@pytest.mark.parametrize("layer", ["mixed", "both"])
def test_rows_on_the_wrong_rank_are_not_proven(unit: Unit, layer: str) -> None:
    group = found_group(layer)
    prove(unit, group, 2)
    swapped(group, layer, 1)
    with pytest.raises(NotProvenError):
        prove(unit, group, 2)


def test_head_counts_are_told(unit: Unit) -> None:
    proof = prove(unit, found_group("mixed"), 2)
    told = [{number.name: value for number, value in s.items()} for s in proof.settings]
    assert told == [{"heads": 3}, {"heads": 2}]


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
    right: Callable[..., None] = Applier.proof

    def wrong(self: Applier, name: str, proof: Any) -> None:
        right(self, name, proof)
        with torch.no_grad():
            model.get_parameter("both.weight").mul_(1.001)

    Applier.proof = wrong  # type: ignore[method-assign]
    try:
        colrow.parallelize(model, mesh_of(tp), example_inputs={"ids": IDS})
    finally:
        Applier.proof = right  # type: ignore[method-assign]
    torch.testing.assert_close(model(IDS), expected, rtol=1e-12, atol=1e-12)
    return [n for n, m in model.named_modules() if isinstance(m, GatheredMixin)]


def test_pairs_with_which_the_model_is_wrong_are_split_otherwise(ranks: RankPool) -> None:
    assert "both" in ranks(2, check_split_otherwise)[0]


def test_limits_follow_the_dtype() -> None:
    assert check.limit_of(OwnModel().double()) < check.limit_of(OwnModel()) < 0.01
