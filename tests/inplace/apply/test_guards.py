"""Modules that hold a divided parameter and that the sample batch does not call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import colrow
from colrow.comm.group import ParallelGroup
from tests.inplace.test_parallelize import mesh_of
from tests.ranks import RankPool

IDS = torch.tensor([[3, 30, 0, 16, 15, 7], [8, 9, 29, 1, 2, 20]])


class Mlp(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(20, 26), nn.Linear(26, 20)
        self.function = function

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        h = self.function(self.up(x))
        y: Tensor = h if features else self.down(h)
        return y


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 20, 16))
        self.down = nn.Parameter(torch.randn(3, 16, 20))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("bsi,eif->besf", x, self.up))
        return torch.einsum("besf,efo->bso", h, self.down)

    def one(self, x: Tensor, number: int) -> Tensor:
        return torch.tanh(x @ self.up[number]) @ self.down[number]


class Modes(nn.Module):
    """A tied language model with ways that its plain forward does not go."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 20)
        self.scaled = ScaledEmbedding(31, 20, padding_idx=2)
        self.experts = Experts()
        self.mlp, self.head = Mlp(), nn.Linear(20, 31, bias=False)
        self.branches = nn.ModuleList([Mlp(), Mlp(), Mlp(partial(torch.softmax, dim=-1))])
        self.scores = nn.Linear(20, 31)
        self.again, self.back = nn.Linear(20, 26), nn.Linear(26, 20)
        self.head.weight = self.scaled.weight = self.embedding.weight
        self.scores.weight = self.table = self.embedding.weight
        self.again.weight, self.back.weight = self.mlp.up.weight, self.mlp.down.weight

    def forward(self, ids: Tensor, mode: str = "") -> Tensor:
        x = self.scaled(ids) if mode == "scaled" else self.embedding(ids)
        if mode == "features":
            return self.mlp(x, features=True)
        if mode == "outside":
            return torch.tanh(self.mlp.up(x))
        if mode == "back":
            x = x + self.back(self.again(x))
        if mode == "again":
            return self.again(x)
        x = x + self.experts(x)
        x = x + self.mlp(x) + self.branches[{"second": 1, "softmax": 2}.get(mode, 0)](x)
        if mode == "table":
            return F.linear(x, self.embedding.weight)
        if mode == "expert":
            return x + self.experts.one(x, 1)
        if mode == "own table":
            return F.linear(x, self.table)
        if mode == "lookup":
            return x + F.embedding(ids // 4, self.embedding.weight)
        if mode == "dtype":
            x = x.to(self.mlp.down.weight.dtype)
        logits: Tensor = self.scores(x) if mode == "scores" else self.head(x)
        return logits

    def encode(self, ids: Tensor) -> Tensor:
        return self.again(self.scaled(ids))


def made() -> Modes:
    torch.manual_seed(0)
    return Modes().double()


def gradients_of(model: nn.Module, result: Tensor) -> None:
    model.zero_grad()
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    (result * weights).sum().backward()


# What holds a divided parameter by tying is split; what has one kind with what ran is as well.
RIGHT = ("", "scaled", "scores", "second", "softmax", "again", "dtype")
REFUSED = {
    "features": "mlp went a way that was not proven: what mlp.up gives",
    "outside": "mlp.up holds some output features on each rank and was called from outside of mlp",
    "back": "back.weight, which it shares with mlp.down.weight, is divided",
    "table": "embedding.weight is divided over the ranks, and code that is not its layer's",
    "expert": "experts.up is divided over the ranks, and code that is not its layer's",
    "own table": "table is divided over the ranks, and code that is not its layer's",
    "lookup": "embedding.weight is divided over the ranks, and code that is not its layer's",
}


def split_modes(tp: ParallelGroup) -> dict[str, tuple[Tensor, dict[str, Tensor]] | str]:
    model = colrow.parallelize(made(), mesh_of(tp), example_inputs={"ids": IDS})
    assert "column-parallel" in repr(model.mlp)
    assert model.get_parameter("experts.up").shape[2] < 16
    found: dict[str, tuple[Tensor, dict[str, Tensor]] | str] = {}
    for mode in RIGHT:
        result = model(IDS, mode)
        gradients_of(model, result)
        found[mode] = result.detach(), colrow.full_grads(model)
    model_: Modes = model  # type: ignore[assignment]
    result = model_.encode(IDS)
    gradients_of(model, result)
    found["encode"] = result.detach(), colrow.full_grads(model)
    for mode in REFUSED:
        with pytest.raises(ValueError, match=r"give colrow\.parallelize example_inputs") as caught:
            model(IDS, mode)
        found[mode] = str(caught.value)
        assert torch.equal(model(IDS), found[""][0])  # and goes on
    return found


@pytest.mark.parametrize("tp", [2, 3])
def test_a_module_that_did_not_run_gives_its_result_or_an_error(ranks: RankPool, tp: int) -> None:
    whole, results = made(), ranks(tp, split_modes)
    for mode in (*RIGHT, "encode"):
        result = whole.encode(IDS) if mode == "encode" else whole(IDS, mode)
        gradients_of(whole, result)
        for got in results:
            torch.testing.assert_close(got[mode][0], result.detach(), rtol=1e-10, atol=1e-12)
        grads = results[0][mode][1]
        for name, parameter in whole.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-11)
    for mode, message in REFUSED.items():
        for got in results:
            assert got[mode].startswith(message)
