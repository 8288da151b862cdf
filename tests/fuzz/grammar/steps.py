"""What stands between two linear layers: steps from ``[batch, sequence, features]`` to the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {}


def step(
    make: Callable[[int], Callable[[Tensor], Tensor]],
) -> Callable[[int], Callable[[Tensor], Tensor]]:
    """Enters what makes a step for a number of features under its name."""
    STEPS[make.__name__] = make
    return make


def plain(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Enters a step without parameters."""
    STEPS[function.__name__] = lambda _: function
    return function


for _function in (
    F.relu,
    F.gelu,
    torch.tanh,
    F.silu,
    torch.sigmoid,
    F.softplus,
    torch.sin,
    torch.abs,
):
    plain(_function)


def groups_of(features: int) -> int:
    """Into how many equal parts the features go: the least number above 1 that divides them."""
    return next(k for k in range(2, features + 1) if features % k == 0) if features > 1 else 1


class Weighted(nn.Module):
    """A step with one parameter.

    Args:
        use: what it does with the features and the parameter.
    """

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.use = use
        self.weight = nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


# Over all features.


@plain
def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


@plain
def log_softmax(x: Tensor) -> Tensor:
    return x.log_softmax(-1)


@plain
def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


@plain
def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@plain
def normalised(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


@plain
def plain_layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


@plain
def cumulated(x: Tensor) -> Tensor:
    return x.cumsum(-1)


@plain
def rolled(x: Tensor) -> Tensor:
    return x.roll(1, -1)


@plain
def flipped(x: Tensor) -> Tensor:
    return x.flip(-1)


@plain
def sorted_features(x: Tensor) -> Tensor:
    return x.sort(-1).values


@plain
def top_two(x: Tensor) -> Tensor:
    kept = x.topk(min(2, x.shape[-1]), -1)
    return torch.zeros_like(x).scatter(-1, kept.indices, kept.values)


@plain
def above_median(x: Tensor) -> Tensor:
    return torch.where(x >= x.median(-1, keepdim=True).values, x, 0.1 * x)


@plain
def winner(x: Tensor) -> Tensor:
    return x * F.one_hot(x.argmax(-1), x.shape[-1])


@plain
def chunk_gate(x: Tensor) -> Tensor:
    a, b = x.tensor_split(2, -1)
    n = min(a.shape[-1], b.shape[-1])
    return torch.cat([a[..., :n] * b[..., :n].sigmoid(), x[..., n:]], -1)


@plain
def split_swap(x: Tensor) -> Tensor:
    first = (x.shape[-1] + 1) // 3
    return torch.cat([x[..., first:], -x[..., :first]], -1)


@plain
def interleaved(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2], x[..., 1::2].relu()], -1)


@plain
def half_rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]], -1)


@plain
def padded_shift(x: Tensor) -> Tensor:
    return F.pad(x, (1, 0))[..., :-1]


@plain
def with_mean(x: Tensor) -> Tensor:
    return torch.cat([x.mean(-1, keepdim=True), x[..., 1:]], -1)


@plain
def with_max(x: Tensor) -> Tensor:
    return x + x.amax(-1, keepdim=True)


@plain
def strided_view(x: Tensor) -> Tensor:
    groups = groups_of(x.shape[-1])
    return x.unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2)


@plain
def summed_first(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., 0] = x.sum(-1)
    return y


@plain
def zeroed_last(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., -1] = 0
    return y


# By groups of features ("heads").


@plain
def head_softmax(x: Tensor) -> Tensor:
    return x.unflatten(-1, (groups_of(x.shape[-1]), -1)).softmax(-1).flatten(-2)


@plain
def head_norm(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (groups_of(x.shape[-1]), -1))
    return F.layer_norm(heads, heads.shape[-1:]).flatten(-2)


@plain
def across_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (groups_of(x.shape[-1]), -1)).softmax(-2).flatten(-2)


@plain
def max_pooled(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (groups_of(x.shape[-1]), -1))
    return (heads - heads.amax(-1, keepdim=True)).flatten(-2)


@step
def heads_mixed(features: int) -> Callable[[Tensor], Tensor]:
    groups = groups_of(features)

    def mix(x: Tensor, weight: Tensor) -> Tensor:
        heads = x.view(*x.shape[:-1], groups, -1)
        return torch.einsum("bshd,hg->bsgd", heads, weight).reshape(x.shape)

    return Weighted(mix, groups, groups)


@step
def per_head_matrix(features: int) -> Callable[[Tensor], Tensor]:
    groups = groups_of(features)
    size = features // groups

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("bshd,hde->bshe", x.view(*x.shape[:-1], groups, -1), weight).flatten(2)

    return Weighted(multiply, groups, size, size)


class Groups(nn.GroupNorm):
    """Normalises groups of features of each token."""

    def __init__(self, features: int) -> None:
        super().__init__(groups_of(features), features)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view(x.shape)


STEPS["group_norm"] = Groups


# With parameters and buffers.


@step
def layer_norm(features: int) -> Callable[[Tensor], Tensor]:
    return nn.LayerNorm(features)


@step
def rms_norm(features: int) -> Callable[[Tensor], Tensor]:
    return nn.RMSNorm(features)


@step
def scaled_by_parameter(features: int) -> Callable[[Tensor], Tensor]:
    return Weighted(lambda x, w: x * (1 + w), features)


@step
def shifted_by_parameter(features: int) -> Callable[[Tensor], Tensor]:
    return Weighted(lambda x, w: x + w, features)


@step
def one_scale(_: int) -> Callable[[Tensor], Tensor]:
    return Weighted(lambda x, w: x * w, 1)


@step
def times_matrix(features: int) -> Callable[[Tensor], Tensor]:
    return Weighted(lambda x, w: x @ w, features, features)


@step
def einsum(features: int) -> Callable[[Tensor], Tensor]:
    return Weighted(lambda x, w: torch.einsum("bsf,gf->bsg", x, w), features, features)


@step
def masked_matrix(features: int) -> Callable[[Tensor], Tensor]:
    return Weighted(lambda x, w: x @ w.tril(), features, features)


@step
def third_linear(features: int) -> Callable[[Tensor], Tensor]:
    return nn.Linear(features, features)


@step
def prelu(features: int) -> Callable[[Tensor], Tensor]:
    return Weighted(lambda x, w: torch.where(x > 0, x, x * w), features)


@step
def bilinear(features: int) -> Callable[[Tensor], Tensor]:
    return Weighted(lambda x, w: x * (x * w).sum(-1, keepdim=True), features)


class Permuted(nn.Module):
    """Features in the order of a buffer, scaled by another."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(features))
        self.register_buffer("scale", torch.rand(features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.order] * self.scale


STEPS["permuted"] = Permuted


class Running(nn.Module):
    """A running mean of the features, updated in training."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean((0, 1)), 0.1)
        return x - self.mean


STEPS["running_mean"] = Running


class Batches(nn.Module):
    """Normalises over batch and sequence."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


STEPS["batch_norm"] = Batches


class Depthwise(nn.Module):
    """Each feature convolved along the sequence."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(features, features, 3, padding=1, groups=features)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


STEPS["depthwise"] = Depthwise


@step
def dropout(_: int) -> Callable[[Tensor], Tensor]:
    return nn.Dropout(0.3)


# What leaves the world of tensors, or depends on the values of all.


@plain
def branch_on_sum(x: Tensor) -> Tensor:
    return x.relu() if x.sum() > 0 else x.tanh()


@plain
def branch_on_mean_of_squares(x: Tensor) -> Tensor:
    return x if float(x.square().mean()) < 0.3 else x * 0.5


@plain
def branch_on_any(x: Tensor) -> Tensor:
    return x.clamp(-1, 1) if bool((x > 1.5).any()) else x.sin()


@plain
def branch_on_first(x: Tensor) -> Tensor:
    return x.relu() if x[0, 0, 0] > 0 else -x


@plain
def scaled_by_item(x: Tensor) -> Tensor:
    return x / (1 + x.abs().max().item())


@plain
def scaled_by_float(x: Tensor) -> Tensor:
    return x * (1 + float(x.detach().mean()))


@plain
def scaled_by_list(x: Tensor) -> Tensor:
    return x * (1 + max(abs(v) for v in x.detach().flatten().tolist()))


@plain
def scaled_by_numpy(x: Tensor) -> Tensor:
    return x * (1 + float(abs(x.detach().numpy()).mean()))


@plain
def fake_quantised(x: Tensor) -> Tensor:
    scale = x.detach().abs().max() / 127 + 1e-9
    return x + ((x / scale).round() * scale - x).detach()


@plain
def clamped_by_deviation(x: Tensor) -> Tensor:
    limit = x.detach().std().item() + 1e-3
    return x.clamp(-limit, limit)


@plain
def clamped_by_quantile(x: Tensor) -> Tensor:
    return torch.minimum(x, x.detach().flatten().kthvalue(max(1, x.numel() // 2)).values)


@plain
def divided_by_std(x: Tensor) -> Tensor:
    return x / (x.std(unbiased=False) + 0.1)


@plain
def where_above_mean(x: Tensor) -> Tensor:
    return torch.where(x > x.mean(), x, 0.2 * x)


@plain
def filled_by_sign(x: Tensor) -> Tensor:
    return x.masked_fill(x < -0.5, 0.0)


@plain
def only_positive(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    chosen = x > 0
    y[chosen] = x[chosen].sqrt() * x[chosen].numel() / x.numel()
    return y


@plain
def nonzero_count(x: Tensor) -> Tensor:
    return x / (1 + x.relu().nonzero().shape[0])


@plain
def equal_check(x: Tensor) -> Tensor:
    return x if torch.equal(x, x.abs()) else x.relu() + 0.1 * x


@plain
def allclose_check(x: Tensor) -> Tensor:
    return x if torch.allclose(x, x.clamp(-0.5, 0.5)) else x * 0.5


@plain
def loop_until_small(x: Tensor) -> Tensor:
    while x.abs().max() > 2:
        x = x * 0.5
    return x


@plain
def branch_on_length(x: Tensor) -> Tensor:
    return x.relu() if x.shape[1] > 4 else x.tanh()


@plain
def branch_on_batch(x: Tensor) -> Tensor:
    return x.relu() if x.shape[0] > 1 else x * 0.7


@plain
def branch_on_features(x: Tensor) -> Tensor:
    return x.relu() if x.shape[-1] > 6 else x * 0.7


@plain
def mean_by_count(x: Tensor) -> Tensor:
    return x - x.sum(-1, keepdim=True) / x.shape[-1]


@plain
def counted_features(x: Tensor) -> Tensor:
    return x * torch.arange(x.shape[-1]).to(x).add(1).rsqrt()


# Along the sequence or the batch.


@plain
def cumulated_sequence(x: Tensor) -> Tensor:
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1).to(x)[:, None]


@plain
def shifted_sequence(x: Tensor) -> Tensor:
    return x + x.roll(1, 1)


@plain
def self_attended(x: Tensor) -> Tensor:
    return (x @ x.transpose(1, 2)).div(x.shape[-1] ** 0.5).softmax(-1) @ x


@plain
def batch_mean(x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True)


@plain
def doubled(x: Tensor) -> Tensor:
    return torch.cat([x, -x], -1).unflatten(-1, (2, -1)).relu().sum(-2)


@plain
def outer_sum(x: Tensor) -> Tensor:
    return (x.unsqueeze(-1) * x.unsqueeze(-2)).sum(-1)


class Chain(nn.Module):
    """Steps one after the other."""

    def __init__(self, names: list[str], features: int) -> None:
        super().__init__()
        made = [STEPS[name](features) for name in names]
        self.parts = nn.ModuleList([c for c in made if isinstance(c, nn.Module)])
        self.functions = [None if isinstance(c, nn.Module) else c for c in made]

    def forward(self, x: Tensor) -> Tensor:
        return run_steps(self.functions, self.parts, x)


def run_steps(
    functions: list[Callable[[Tensor], Tensor] | None], parts: nn.ModuleList, x: Tensor
) -> Tensor:
    """Functions in their order, where there is None the next of the modules."""
    modules = iter(parts)
    for function in functions:
        x = next(modules)(x) if function is None else function(x)
    return x
