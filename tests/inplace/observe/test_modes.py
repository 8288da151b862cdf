"""Modes in which models are run: each module's own afterwards, and no dropout."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.comm.group import ParallelGroup
from colrow.inplace.apply.layers import TokenRegion
from colrow.inplace.apply.sequence import DropoutMixin
from colrow.inplace.observe.modes import DropoutSpy, NoDropout, evaluating
from colrow.partition import Partition


@pytest.mark.parametrize("modes", [(True, True, True), (True, False, True), (False, False, False)])
def test_every_module_has_its_mode_again(modes: tuple[bool, ...]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        model.train()  # as a model that must be in training for its backward
    assert tuple(module.training for module in model.modules()) == modes


Q = torch.randn(1, 2, 5, 4)


@pytest.mark.parametrize(
    ("call", "drops"),
    [
        (lambda: F.dropout(Q, 0.5), True),
        (lambda: F.dropout(Q, p=0.5, training=False), False),
        (lambda: torch.dropout(Q, 0.5, True), True),
        (lambda: torch.dropout(Q, 0.5, False), False),
        (lambda: F.scaled_dot_product_attention(Q, Q, Q, None, 0.5, True), True),
        (lambda: F.scaled_dot_product_attention(Q, Q, value=Q, dropout_p=0.5), True),
        (lambda: F.scaled_dot_product_attention(Q, Q, Q, is_causal=True), False),
    ],
)
def test_dropout_is_left_out_and_noted(call: Callable[[], Tensor], drops: bool) -> None:
    with NoDropout() as mode:
        first, again = call(), call()
    assert mode.met == drops
    assert first.equal(again)
    assert bool(first.ne(0).all())


class Dropping(nn.Module):
    def __init__(self, train: bool) -> None:
        super().__init__()
        self.train_argument = train

    def forward(self, x: Tensor) -> Tensor:
        return torch.dropout(x, p=0.5, train=self.train_argument)


class DroppingTokens(DropoutMixin, Dropping):
    pass


@pytest.mark.parametrize("train", [True, False])
def test_keywords_of_dropout_are_understood_in_every_mode(train: bool) -> None:
    x = torch.ones(2, 5, 4)
    with NoDropout() as none:
        Dropping(train)(x)
    assert none.met == train
    with DropoutSpy() as spy:
        Dropping(train)(x)
    assert spy.seen == [x.shape] * train
    block = DroppingTokens(train)
    block.colrow_region = TokenRegion(ParallelGroup(None, 0, 1), "blocks", Partition.even(5, 1))
    assert block(x).eq(0).any() == train
