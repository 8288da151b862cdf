"""Divided values that a module keeps or gives away: for its next call, or for code around it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.comm.group import ParallelGroup
from colrow.inplace.analysis import analyse
from colrow.inplace.api import plan_for
from tests.inplace.observe.test_decisions import IDS, Block, Model
from tests.inplace.test_parallelize import mesh_of
from tests.ranks import RankPool

SPLIT, WHOLE = "rowwise", "colwise_gather_output"


class Keeping(Block):
    """``between(self, hidden)``, with a buffer and an attribute."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(lambda h, x: h)
        self.how = between
        self.register_buffer("scale", torch.ones(()))
        self.last: Any = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.how(self, self.up(x)))  # type: ignore[no-any-return]


def moving_scale(own: Any, h: Tensor) -> Tensor:
    """Follows the deviation in training, and divides by it in eval mode."""
    if own.training:
        own.scale.mul_(0.9).add_(0.1 * h.detach().std())
        return h.tanh()
    return torch.tanh(h / own.scale)


def limit_for_next(own: Any, h: Tensor) -> Tensor:
    """Reads in eval mode what training has left."""
    if own.training:
        own.last = h.detach().abs().amax()
        return h.tanh()
    return h.clamp(max=max(float(own.last), 3.0))


def keeps_only(own: Any, h: Tensor) -> Tensor:
    """For whoever looks at activations."""
    own.last = h.tanh()
    return own.last  # type: ignore[no-any-return]


def row_of(model: nn.Module, name: str = "blocks.*.down", **inputs: Any) -> Any:
    plan = plan_for(model, 2, example_inputs=inputs or {"ids": IDS})
    return next(row for row in plan.rows if row.module == name)


@pytest.mark.parametrize("between", [moving_scale, limit_for_next])
def test_what_a_call_leaves_for_the_next(between: Any) -> None:
    torch.manual_seed(0)
    row = row_of(Model(Keeping(between)))
    assert row.style == WHOLE
    assert "an earlier call kept" in row.why
    assert Path(__file__).name in row.why


def test_what_is_only_kept() -> None:
    torch.manual_seed(0)
    assert row_of(Model(Keeping(keeps_only))).style == SPLIT


class Around(Model):
    """A model with code of its own around blocks that keep their features."""

    def __init__(self, use: Callable[[Any, list[Tensor]], Any]) -> None:
        super().__init__(Keeping(keeps_only), Keeping(keeps_only))
        self.use = use

    def forward(self, ids: Tensor) -> Any:
        logits = super().forward(ids)
        return self.use(logits, [block.last for block in self.blocks])  # type: ignore[misc]


class InTraining(Around):
    """Adds a penalty on the features of its blocks, in training."""

    def forward(self, ids: Tensor) -> Any:
        logits = Model.forward(self, ids)
        if not self.training:
            return logits
        return logits, sum(block.last.abs().mean() for block in self.blocks)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("use", "style"),
    [
        (lambda y, kept: y if kept[0].abs().max() < 2 else y * 2, WHOLE),
        (lambda y, kept: y * (kept[1].abs().max() < 2), WHOLE),
        (lambda y, kept: (y, [h.shape for h in kept]), SPLIT),
        (lambda y, kept: y, SPLIT),
    ],
)
def test_what_is_decided_by_features_that_a_block_keeps(use: Any, style: str) -> None:
    torch.manual_seed(0)
    assert row_of(Around(use)).style == style


def test_a_penalty_on_kept_features_in_training() -> None:
    torch.manual_seed(0)
    model = InTraining(lambda y, kept: y)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    row = row_of(model)
    assert row.style == WHOLE
    assert "in training it computes with divided values" in row.why
    after = model.state_dict()
    assert all(torch.equal(after[n], x) for n, x in before.items() if not n.endswith("scale"))


class OnWeights(nn.Module):
    """A penalty on attention weights, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = _Attention()
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Any:
        y, weights = self.attention(self.norm(x.mT).mT)
        return (y, weights.square().mean()) if self.training else y


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 2, 6
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT).softmax(-1)
        return self.out(
            (weights @ v).transpose(1, 2).reshape(*x.shape[:2], self.heads * self.size)
        ), weights


def test_a_penalty_on_attention_weights_in_training() -> None:
    torch.manual_seed(0)
    model = OnWeights()
    x = torch.randn(2, 6, 12)
    row = row_of(model, "attention.out", x=x)
    assert row.style == WHOLE
    assert "in training it computes with divided values" in row.why
    assert not model.norm.running_mean.any()  # type: ignore[union-attr]
    assert not model.norm.num_batches_tracked  # type: ignore[truthy-bool]


def test_tokens_that_a_block_keeps() -> None:
    torch.manual_seed(0)

    class Kept(Block):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.down(self.up(x).relu())
            self.last = y.detach() * 2
            return y

    model = Model(*(Kept(lambda h, x: h) for _ in range(2)))
    with pytest.raises(ValueError, match="keeps values of tokens"):
        analyse(model, 2, "auto", {"ids": IDS}, sequence_parallel=True)


def test_a_pair_beside_weights_that_are_used_directly() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
    row = row_of(nn.TransformerEncoder(layer, 2), "layers.*.linear2", src=torch.randn(2, 6, 12))
    assert row.style == SPLIT


def check_kept(tp: ParallelGroup) -> None:
    torch.manual_seed(0)
    model = InTraining(lambda y, kept: y).double()
    model.blocks[0].how = lambda own, h: keeps_only(own, moving_scale(own, h))
    twin = copy.deepcopy(model)
    colrow.parallelize(model, mesh_of(tp), example_inputs={"ids": IDS})
    for training in (True, False, True, False):
        ids = torch.randint(0, 31, (2, 6))
        results, expected = model.train(training)(ids), twin.train(training)(ids)
        torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-10)


def test_the_numbers_of_a_model_that_keeps(ranks: RankPool) -> None:
    ranks(2, check_kept)
