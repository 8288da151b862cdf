"""What a forward decides by features that are divided: such layers stay whole, and say why."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import colrow
from colrow.comm.group import ParallelGroup
from colrow.inplace.analysis import analyse
from colrow.inplace.api import plan_for
from colrow.inplace.find.model_code import local_loss_is_right
from colrow.inplace.find.whole_results import VocabularyLayers
from tests.inplace.test_parallelize import mesh_of
from tests.ranks import RankPool

IDS = torch.arange(12).view(2, 6)
Between = Callable[[Tensor, Tensor], Any]


class Block(nn.Module):
    """An MLP with ``between(hidden, input)`` between its layers."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.between = between
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.between(self.up(x), x))


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 12)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(12, 31)

    def forward(self, ids: Tensor) -> Any:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Experts(nn.Module):
    """Two experts in stacked weights, with ``between`` inside each."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.between = between
        self.up = nn.Parameter(torch.randn(2, 12, 16))
        self.down = nn.Parameter(torch.randn(2, 16, 12))

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.between(x @ self.up[i], x) @ self.down[i] for i in range(2)]
        return x + parts[0] * 0.3 + parts[1] * 0.7


class Own(torch.autograd.Function):
    """Hidden values read where autograd does not look."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h * 2 if h.sum() > 0 else h * 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def written(h: Tensor, mask: Tensor, value: Any) -> Tensor:
    y = h.clone()
    y[mask] = value
    return y


# A number leaves the tensors. In the sample most of them are the same for whole and part.
READS: dict[str, Between] = {
    "branch": lambda h, x: h.relu() if h.sum() > 0 else h.tanh(),
    "item": lambda h, x: h * (1 if h.abs().max().item() > 100 else 2),
    "float": lambda h, x: h * min(1.0, 50 / float(h.norm())),
    "int": lambda h, x: h * [1, 1, 1][int(h.sum() > 100)],
    "list": lambda h, x: h.tanh() * (2 if max(h.flatten().tolist()) > 100 else 1),
    "numpy": lambda h, x: h.tanh() * (2 if h.detach().numpy().max() > 100 else 1),
    "array": lambda h, x: h.tanh() * (2 if np.asarray(h.detach()).max() > 100 else 1),
    "equal": lambda h, x: h if torch.equal(h, h.clamp(-100, 100)) else h * 2,
    "allclose": lambda h, x: h if torch.allclose(h, h.clamp(-100, 100)) else h * 2,
    "contains": lambda h, x: h * 2 if 0.0 in h else h.tanh(),
    "text": lambda h, x: h * 2 if "nan" in f"{h.sum()}" else h.tanh(),
    "deepcopy": lambda h, x: h * (2 if copy.deepcopy(h.detach()).max() > 100 else 1),
    "nonzero": lambda h, x: h * (1 if len((h > 100).nonzero()) else 2),
    "unique": lambda h, x: h * (h > -1e9).unique().numel(),
    "length": lambda h, x: h * (2 if h[h > 0].shape[0] > 1000 else 1),
    "autograd": lambda h, x: Own.apply(h),
}

# It stays in tensors, and hides in the sample that more than a rank's part is looked at.
DECIDES: dict[str, Between] = {
    "maximum": lambda h, x: torch.where(h.abs().amax(-1, keepdim=True) > 50, h / 2, h),
    "deviation": lambda h, x: h.clamp(max=100 * h.std()),
    "minimum": lambda h, x: torch.minimum(h, 30 * h.std(-1, keepdim=True)),
    "any": lambda h, x: h * (1 + (h > 100).any()),
    "all": lambda h, x: h * (1 + (h < 100).all(-1, keepdim=True)),
    "count": lambda h, x: h * (1 + ((h > 1e6).sum() > 4)),
    "share": lambda h, x: h * (1 + (h > 1e6).double().mean()),
    "not taken": lambda h, x: torch.where(h > 1e6, h * h.mean(), h.tanh()),
    "of a place": lambda h, x: torch.where(h > 1e6, h * torch.arange(h.shape[-1]), h.tanh()),
    "inner": lambda h, x: torch.where(h > 1e6, torch.where(h < 1e7, h * h.mean(), h), h.tanh()),
    "argmax": lambda h, x: h * (h.argmax(-1, keepdim=True) > -1),
    "ranks": lambda h, x: h * (h.argsort(-1).argsort(-1) < 1000),
    "quantised": lambda h, x: h * (torch.round(h / (h.abs().max() * 1e3)) + 1),
    "dead": lambda h, x: h + F.relu(h - 100 * h.std()),
    "sign": lambda h, x: h * torch.sign(h.sum()),
    "whole number": lambda h, x: h * (1 + (h.abs().max() / 1000).int()),
    "not a number": lambda h, x: torch.where(torch.isnan(h).any(), h * 2, h),
    "k-th": lambda h, x: h * (h.kthvalue(3, -1, keepdim=True).values < 1e6),
    "written": lambda h, x: written(h, h > 1e6, h.detach().mean()),
    "chosen": lambda h, x: h * (1 + 0 * h[h > 0].mean()).round(),
}

# What each feature decides for itself, and what the whole input decides, is right on a part.
RIGHT: dict[str, Between] = {
    "relu": lambda h, x: F.relu6(h) + F.hardswish(h) + F.threshold(h, 0.1, 20.0),
    "input": lambda h, x: h.relu() if x.sum() > 0 else h * x.abs().max().item(),
    "features": lambda h, x: torch.where(h > 0, h, 0.1 * h).masked_fill(h > 1, 1.0),
    "tokens": lambda h, x: h * (h > h.mean(1, keepdim=True)) + h.cummax(1).values,
    "written": lambda h, x: written(h, h > 0, torch.log1p(h[h > 0])),
    "stable": lambda h, x: torch.exp(h - h.max()) / torch.exp(-h.max()),
    "rounded": lambda h, x: h.clamp(-1, 1) + (torch.round(h * 4) / 4 - h).detach(),
}


def down_of(between: Between) -> Any:
    torch.manual_seed(0)
    plan = plan_for(Model(Block(between)), 2, example_inputs={"ids": IDS})
    return next(row for row in plan.rows if row.module == "blocks.*.down")


@pytest.mark.parametrize("name", READS)
def test_a_number_read_from_divided_features(name: str) -> None:
    row = down_of(READS[name])
    assert row.style == "colwise_gather_output"
    assert "its forward reads" in row.why
    assert "test_decisions.py" in row.why


@pytest.mark.parametrize("name", DECIDES)
def test_a_choice_that_depends_on_other_ranks(name: str) -> None:
    assert down_of(DECIDES[name]).style == "colwise_gather_output"


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_on_a_part_stays_split(name: str) -> None:
    assert down_of(RIGHT[name]).style == "rowwise"


@pytest.mark.parametrize(
    ("between", "style"),
    [
        (READS["branch"], "gathered_parameter"),
        (DECIDES["deviation"], "gathered_parameter"),
        (DECIDES["any"], "gathered_parameter"),
        (RIGHT["features"], "moe_tp_experts"),
    ],
)
def test_experts_in_stacked_weights(between: Between, style: str) -> None:
    torch.manual_seed(0)
    plan = plan_for(Model(Experts(between)), 2, example_inputs={"ids": IDS})
    assert plan["blocks.*.down"] == style


class Given(Block):
    """Gives its divided features away."""

    def forward(self, x: Tensor) -> Any:
        h = self.up(x).tanh()
        return x + self.down(h), h


class Taking(Model):
    """Looks at what its first block gives away."""

    def __init__(self, after: Between) -> None:
        super().__init__(Given(after))

    def forward(self, ids: Tensor) -> Any:
        y, h = self.blocks[0](self.embedding(ids))
        return self.head(self.blocks[0].between(y, h))


@pytest.mark.parametrize(
    ("after", "style"),
    [
        (lambda y, h: y if h.sum() > -1e5 else y * 2, "colwise_gather_output"),
        (lambda y, h: y * (h.abs().max() < 1e5), "colwise_gather_output"),
        (lambda y, h: y, "rowwise"),
    ],
)
def test_what_the_model_decides_by_features_given_away(after: Between, style: str) -> None:
    torch.manual_seed(0)
    assert plan_for(Taking(after), 2, example_inputs={"ids": IDS})["blocks.*.down"] == style


class Backward(torch.autograd.Function):
    """Its backward pass does ``of`` to the gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, of: Any) -> Tensor:
        ctx.of = of
        return h * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.of(grad * 2), None


def hooked(h: Tensor) -> Tensor:
    h = h * 1
    if h.requires_grad:
        h.register_hook(lambda grad: grad / max(1.0, float(grad.norm()) / 1e6))
    return h


@pytest.mark.parametrize(
    ("between", "style"),
    [
        (lambda h, x: Backward.apply(h, lambda g: g if g.norm() < 1e9 else 0), "gathered"),
        (lambda h, x: Backward.apply(h, lambda g: g.clamp(max=1e4 * g.std())), "gathered"),
        (lambda h, x: hooked(h), "gathered"),
        (lambda h, x: Backward.apply(h, lambda g: g.clamp(-1e3, 1e3)), "rowwise"),
    ],
)
def test_what_a_backward_pass_decides(between: Between, style: str) -> None:
    row = down_of(between)
    assert style in (row.style, row.why.partition(":")[0])


def ForCausalLMLoss(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class WithLoss(nn.Module):
    """A model that takes its loss as those of transformers do."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before = before
        self.embedding, self.head = nn.Embedding(31, 12), nn.Linear(12, 31)

    @property
    def loss_function(self) -> Any:
        return self.__dict__.get("_loss_function", ForCausalLMLoss)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self.__dict__["_loss_function"] = value

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.before(self.head(self.embedding(input_ids)))
        return self.loss_function(logits, labels, 31), logits


@pytest.mark.parametrize(
    ("before", "right"),
    [
        (lambda y: torch.tanh(y / 30) * 30, True),
        (lambda y: y if y.abs().max() < 1e3 else y / 2, False),
        (lambda y: y.clamp(max=1000 * y.std()), False),
    ],
)
def test_a_loss_of_logits_by_which_something_is_decided(before: Any, right: bool) -> None:
    model = WithLoss(before)
    layers = VocabularyLayers({}, {"head": model.head})
    assert local_loss_is_right(model, {"input_ids": IDS}, layers) == right
    assert model.loss_function is ForCausalLMLoss


class After(Block):
    """A block that changes its result."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.between(x + self.down(self.up(x).relu()), x)
        return y


@pytest.mark.parametrize(
    ("after", "right"),
    [
        (lambda y, x: y if y.abs().max() < 1e3 else y / 2, False),
        (lambda y, x: y.clamp(max=1000 * y.std()), False),
        (lambda y, x: torch.where(torch.isinf(y).any(), y.clamp(-5, 5), y), False),
        (lambda y, x: y.clamp(max=1000 * y.std(-1, keepdim=True)), True),
    ],
)
def test_tokens_divided_between_blocks(after: Between, right: bool) -> None:
    torch.manual_seed(0)
    model = Model(After(after), After(after))

    def run() -> None:
        analyse(model, 2, "auto", {"ids": IDS}, sequence_parallel=True)

    if right:
        return run()
    with pytest.raises(ValueError, match="cannot be divided by tokens: its forward"):
        run()


class Stopping(Model):
    """Reads the tokens between its blocks."""

    def forward(self, ids: Tensor) -> Any:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
            if x.norm() > 1e9:
                break
        return self.head(x)


def test_tokens_read_between_blocks() -> None:
    model = Stopping(*(After(lambda y, x: y) for _ in range(2)))
    with pytest.raises(ValueError, match="between them the model's own code: its forward reads"):
        analyse(model, 2, "auto", {"ids": IDS}, sequence_parallel=True)


def check_branches(tp: ParallelGroup) -> None:
    torch.manual_seed(0)
    blocks = [Block(READS["branch"]), Block(DECIDES["maximum"]), Block(RIGHT["features"])]
    model = Model(*blocks).double()
    batches = [torch.randint(0, 31, (2, 6)) for _ in range(4)]
    with torch.no_grad():
        model.blocks[0].up.bias -= 0.02  # type: ignore[operator,union-attr]
    expected = [model(ids) for ids in batches]
    colrow.parallelize(model, mesh_of(tp), example_inputs={"ids": IDS})
    assert model.get_parameter("blocks.2.down.weight").shape[1] < 24
    for ids, whole in zip(batches, expected, strict=True):
        torch.testing.assert_close(model(ids), whole, rtol=1e-10, atol=1e-10)


def test_the_numbers_of_the_whole_model(ranks: RankPool) -> None:
    ranks(2, check_branches)
