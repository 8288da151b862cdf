"""What is not the whole is not proven."""

import pytest
import torch

from colrow.inplace.analysis import analyse
from colrow.inplace.find.layer_groups import LayerGroup
from colrow.inplace.find.pair_proof import prove_group
from colrow.inplace.find.proof import NotProvenError
from colrow.inplace.observe.calls import ModuleCall
from colrow.inplace.observe.unit import Unit
from tests.inplace.test_parallelize import OwnModel

IDS = torch.arange(12).view(2, 6) % 7


@pytest.fixture(scope="module")
def unit() -> Unit:
    torch.manual_seed(0)
    return Unit.of("", OwnModel(), ModuleCall((IDS,), {}))


def found_group(layer: str) -> LayerGroup:
    torch.manual_seed(0)
    (proofs,) = analyse(OwnModel(), 2, "auto", {"ids": IDS}).inference.proofs.values()
    return next(proof.group for proof in proofs if layer in proof.group.columns)


def swapped(group: LayerGroup, layer: str, rank: int) -> None:
    """The rank's first row becomes one of another rank's."""
    rows = group.columns[layer]
    taken = min({*range(max(map(max, rows)) + 1)} - {*rows[rank]})
    rows[rank] = sorted([*rows[rank][1:], taken])


@pytest.mark.parametrize("layer", ["mixed", "both"])
def test_rows_on_the_wrong_rank_are_not_proven(unit: Unit, layer: str) -> None:
    group = found_group(layer)
    prove_group(unit, group, 2)
    swapped(group, layer, 1)
    with pytest.raises(NotProvenError):
        prove_group(unit, group, 2)


def test_head_counts_are_told(unit: Unit) -> None:
    proof = prove_group(unit, found_group("mixed"), 2)
    told = [{number.name: value for number, value in s.items()} for s in proof.local_sizes]
    assert told == [{"heads": 3}, {"heads": 2}]
