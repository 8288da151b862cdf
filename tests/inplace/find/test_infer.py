"""What is found in modules of less usual kinds; without ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.inplace.analysis import Analysis, analyse

X = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def analysed(model: nn.Module, **inputs: Any) -> Analysis:
    return analyse(model.double(), 2, "auto", inputs or {"x": X})


def styles(found: Analysis) -> dict[str, str]:
    return dict(found.plan)


class Places(nn.Embedding):
    """A table of positions that is asked with tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[: ids.shape[-1]].expand(*ids.shape, -1)


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(31, 12), Places(16, 12)
        self.up, self.down = nn.Linear(12, 9), nn.Linear(9, 31)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(self.tokens(ids) + self.places(ids)).relu())
        return result


def test_a_table_with_a_forward_of_its_own_stays_whole() -> None:
    found = analysed(Placed(), ids=torch.tensor([[5, 1, 7], [2, 2, 9]]))
    assert "places" not in styles(found)
    assert found.gathered.tables == {}


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(F.gelu(self.b(F.gelu(self.a(x)))))
        return result


def test_a_layer_is_in_one_pair_only() -> None:
    found = analysed(Router())
    (proofs,) = found.inference.proofs.values()
    layers = [n for p in proofs for n in (*p.group.columns, *p.group.rows)]
    assert len(layers) == len(set(layers)) == 2


class Flat(nn.Module):
    """Three experts whose features lie in one dimension, beside experts that hand tokens on."""

    def __init__(self, *, hands_on: bool) -> None:
        super().__init__()
        self.width, self.hands_on = 5, hands_on
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(15, 12)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        total = 0.5 * x if self.hands_on else torch.zeros_like(x)
        stacks = [w.view(3, self.width, 12) for w in (self.gate, self.up, self.down)]
        for gate, up, down in zip(*stacks, strict=True):
            total = total + (F.silu(x @ gate.T) * (x @ up.T)) @ down
        return total


@pytest.mark.parametrize("hands_on", [False, True])
def test_experts_in_two_dimensions_are_split_inside_each(hands_on: bool) -> None:
    found = analysed(nn.Sequential(Flat(hands_on=hands_on)), input=X)
    (proof,) = found.inference.proofs["0"]
    rows = proof.group.parameters["down"][1]
    assert rows[0] == [i for i in range(15) if i % 5 < 3] and len(rows[1]) == 6
    assert proof.summed and bool(proof.base_without) == hands_on


class Apart(nn.Module):
    """Experts' weights in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Stack(3, 12, 7), Stack(3, 7, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.expand(3, *x.shape)).relu()).sum(0)


class Stack(nn.Module):
    def __init__(self, experts: int, inside: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, inside, out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ebsi,eio->ebso", x, self.weight)


def test_experts_in_several_modules_are_split_together() -> None:
    found = analysed(nn.Sequential(Apart()), input=X)
    (proof,) = found.inference.proofs["0"]
    assert set(proof.group.parameters) == {"first.weight", "second.weight"}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, 3, 12))  # as small as it is in a real model
        self.mix = nn.Parameter(torch.randn(12, 12))
        self.up, self.down = nn.Linear(12, 9), nn.Linear(9, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = ((x + self.places) @ self.mix).softmax(-1)
        result: Tensor = self.down(self.up(x).relu())
        return result


def test_a_matrix_that_is_in_no_pair_is_gathered_where_it_is_used() -> None:
    found = analysed(Mixed())
    assert found.gathered.parameters == {"mix": 0}
    row = next(row for row in found.plan.rows if row.module == "mix")
    assert row.style == "gathered_parameter" and row.share == 0.5 and "in no pair" in row.why
