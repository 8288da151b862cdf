from __future__ import annotations

import pytest
import torch

from colrow import ParallelGroup
from tests.layers.catalogue import CASES
from tests.layers.dense import parameter_specs
from tests.ranks import RankError, RankPool


def local_weights(tp: ParallelGroup) -> list[dict[str, torch.Tensor]]:
    """This rank's initial parameters of every layer, each made after torch.manual_seed(0)."""
    found = []
    for case in CASES:
        torch.manual_seed(0)
        layer = case.make(tp, torch.float32)
        found.append({name: p.detach().clone() for name, p in layer.named_parameters()})
    return found


@pytest.mark.parametrize("n", [2, 3, 4])
def test_initial_weights_do_not_depend_on_the_number_of_ranks(ranks: RankPool, n: int) -> None:
    (whole,) = ranks(1, local_weights)
    shards = ranks(n, local_weights)
    for number, case in enumerate(CASES):
        # Only the specification is asked of this layer, so that one process can play every rank.
        for rank in range(n):
            with torch.device("meta"):
                layer = case.make(_Rank(n, rank), torch.float32)
            for name, spec in parameter_specs(layer).items():
                expected = whole[number][name]
                if spec.dim is not None:
                    pieces = [
                        expected.narrow(spec.dim, a, b - a) for a, b in spec.global_ranges(rank)
                    ]
                    expected = torch.cat(pieces, spec.dim)
                assert torch.equal(shards[rank][number][name], expected), (case.name, name)


class _Rank(ParallelGroup):
    """A group whose other ranks are not there: enough for constructors on meta."""

    def __init__(self, size: int, rank: int) -> None:
        self.group, self.rank, self.size = None, rank, size
        self.name, self.ledger = "tp", None


def make_after_different_seeds(tp: ParallelGroup, number: int) -> None:
    torch.manual_seed(tp.rank)
    CASES[number].make(tp, torch.float32)


@pytest.mark.cpu_only("a GPU asserts it, which ends the process")
def test_ranks_with_different_seeds(ranks: RankPool) -> None:
    """Each would hold other values of what all ranks hold, or parts of different weights."""
    drawn = [n for n, case in enumerate(CASES) if "norm" not in case.name]
    assert len(drawn) >= 16
    for number in drawn:
        with pytest.raises(RankError, match=r"torch\.manual_seed with the same number") as caught:
            ranks(2, make_after_different_seeds, number)
        assert set(caught.value.errors) == {0, 1}


def test_they_are_torchs_defaults() -> None:
    """Uniform within 1/sqrt(in) for linear layers, standard normal for embeddings."""
    tp = ParallelGroup.single()
    by_name = {case.name: case for case in CASES}
    column = by_name["column"].make(tp, torch.float32)
    bound = column.in_features**-0.5
    for parameter in column.parameters():
        assert 0.9 * bound < parameter.abs().max() < bound
        assert abs(parameter.mean().item()) < 0.2 * bound
    table = by_name["embedding"].make(tp, torch.float32).weight
    assert abs(table.mean().item()) < 0.1 and abs(table.std().item() - 1) < 0.1
    torch.manual_seed(0)
    first, second = (by_name["mlp"].make(tp, torch.float32) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert not torch.equal(a, b)
