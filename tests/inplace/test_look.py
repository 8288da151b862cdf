"""What is looked at in a model: its calls and results, its modes, and what reaches what."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.comm.group import ParallelGroup
from colrow.inplace.capture import capture_calls, evaluating
from colrow.inplace.dropout import NoDropout
from colrow.inplace.modules import Region
from colrow.inplace.probe import patterns
from colrow.inplace.sequence_boundary import DropoutSpy
from colrow.inplace.sequence_modules import DropoutMixin
from colrow.partition import Partition


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        y = self.drop(self.layer(x)) * scale
        return {"result": y, "where": y.argmax(-1)}


def test_results_are_those_of_the_first_batch() -> None:
    model, x = Halves().double(), torch.randn(2, 4, dtype=torch.float64)
    calls, results = capture_calls(model, [{"x": x}, {"x": x, "scale": 2.0}, {"y": x}])
    assert calls["layer"].args[0].equal(x)
    (result,) = results
    torch.testing.assert_close(result, F.linear(x, model.layer.weight, model.layer.bias).detach())


@pytest.mark.parametrize("modes", [(True, True, True), (True, False, True), (False, False, False)])
def test_every_module_has_its_mode_again(modes: tuple[bool, ...]) -> None:
    model = Halves()
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
def test_keywords_of_dropout_are_understood_wherever_it_is_looked_at(train: bool) -> None:
    x = torch.ones(2, 5, 4)
    with NoDropout() as none:
        Dropping(train)(x)
    assert none.met == train
    with DropoutSpy() as spy:
        Dropping(train)(x)
    assert spy.seen == [x.shape] * train
    block = DroppingTokens(train)
    block.colrow_region = Region(ParallelGroup(None, 0, 1), "blocks", Partition.even(5, 1))
    assert block(x).eq(0).any() == train


def test_patterns_of_vectors_and_of_what_reaches_nothing() -> None:
    x, scale, apart = (torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (4, 2, 3))
    rows = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    target = (x + rows[0] * 2).unflatten(-1, (2, 2)) * scale[:, None]
    found = patterns([target.flatten()], [rows, x, scale, apart], vectors=1)
    assert found[0] == {1: [1, 2, 4, 8], -1: [1, 2, 4, 8]}
    assert found[1] == {0: [1, 2, 4, 8], -1: [1, 2, 4, 8]}
    assert found[2] == {0: [0b11, 0b1100], -1: [0b11, 0b1100]}
    assert found[3] == {0: [0, 0, 0], -1: [0, 0, 0]}
    (whole,) = patterns([target.flatten()], [rows])
    assert whole[0] == [0b1111, 0, 0] and whole[1] == found[0][1]
