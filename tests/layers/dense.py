"""Parallel layers against dense ones with the same whole weights: every number is compared.

The reference always computes in fp64, from values that the layer's dtype can represent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from colrow.comm.group import ParallelGroup
from colrow.partition import Partition, ShardSpec
from tests.devices import moved

Weights = dict[str, Tensor]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return moved(drawn.to(dtype))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """``‖actual − expected‖ / ‖expected‖`` is at most the tolerance."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    difference = (actual.double() - expected.double()).norm()
    size = expected.double().norm()
    error = (difference / size).item() if size else difference.item()
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.0e}"


def part(whole: Tensor, spec: ShardSpec, rank: int) -> Tensor:
    """What a rank holds of a whole tensor."""
    if spec.dim is None:
        return whole
    ranges = spec.global_ranges(rank)
    return torch.cat([whole.narrow(spec.dim, a, b - a) for a, b in ranges], spec.dim)


def gradient_part(whole: Tensor, spec: ShardSpec, rank: int) -> Tensor:
    """What a rank contributes to a whole gradient.

    Of an index with several holders each contributes an own fraction, and these sum to one. A
    result that all ranks hold has its whole gradient on each of them.
    """
    if spec.dim is None:
        return whole
    fractions = []
    for block in spec.blocks:
        votes = torch.zeros(block.parts, block.length, dtype=torch.float64)
        for holder, (start, stop) in enumerate(block.bounds):
            votes[holder, start:stop] = holder + 1
        fractions.append(votes[rank] / votes.sum(0))
    shape = [1] * whole.dim()
    shape[spec.dim] = -1
    return part(whole.double() * torch.cat(fractions).view(shape), spec, rank).to(whole.dtype)


def divided(x: Tensor, dim: int, *blocks: Partition) -> ShardSpec:
    """A tensor of this shape, divided along ``dim``."""
    return ShardSpec(tuple(x.shape), dim % x.dim(), blocks)


def parameter_specs(layer: nn.Module) -> dict[str, ShardSpec]:
    """Every parameter's name and how it is divided."""
    specs = {}
    for name, _ in layer.named_parameters():
        module, _, kind = name.rpartition(".")
        specs[name] = getattr(layer.get_submodule(module), f"{kind}_spec")
    return specs


def whole_weights(layer: nn.Module, seed: int = 2) -> Weights:
    """Random whole weights in fp64, as leaves that require a gradient."""
    weights = {}
    for number, (name, spec) in enumerate(parameter_specs(layer).items()):
        dtype = layer.get_parameter(name).dtype
        scale = spec.shape[-1] ** -0.5 if len(spec.shape) > 1 else 1.0
        value = random(*spec.shape, seed=100 * seed + number) * scale
        weights[name] = value.to(dtype).double().requires_grad_()
    return weights


@torch.no_grad()
def place(layer: nn.Module, weights: Weights, rank: int) -> None:
    """Copies each parameter's part of the whole weights into the layer."""
    for name, spec in parameter_specs(layer).items():
        layer.get_parameter(name).copy_(part(weights[name], spec, rank))


def compare(
    tp: ParallelGroup,
    layer: nn.Module,
    dense: Callable[[Weights, Tensor], Tensor],
    x: Tensor,
    what: str,
    *,
    x_spec: ShardSpec | None = None,
    y_spec: Callable[[Tensor], ShardSpec] | None = None,
    run: Callable[[Tensor], Tensor] | None = None,
    result_dtype: torch.dtype | None = None,
    tolerance: float | None = None,
) -> None:
    """Forward, input gradient and every parameter gradient against the dense layer.

    Args:
        layer: gets random weights; parameters without requires_grad must stay without gradient.
        dense: the whole weights by the layer's parameter names and the whole input, to the whole
            result, in plain torch.
        x: whole input; its gradient is compared if it requires one.
        x_spec, y_spec: how input and result are divided; held by all ranks by default.
        run: how to call the layer, if not as it is.
        result_dtype: by default that of the input.
        tolerance: by default that of the result's dtype.
    """
    weights = whole_weights(layer)
    place(layer, weights, tp.rank)
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    layer.zero_grad()

    whole_x = x.detach().double() if x.is_floating_point() else x
    whole_x.requires_grad_(x.requires_grad)
    whole_y = dense(weights, whole_x)
    whole_grad = random(*whole_y.shape, seed=3)
    whole_y.backward(whole_grad)

    local_x = part(x.detach(), x_spec, tp.rank) if x_spec else x.detach()
    local_x = local_x.clone().requires_grad_(x.requires_grad)
    before = local_x.detach().clone()
    local_y = (run or layer)(local_x)
    expected_dtype = result_dtype or (x.dtype if x.is_floating_point() else local_y.dtype)
    assert local_y.dtype == expected_dtype, f"{what}: result is {local_y.dtype}"
    limit = tolerance or TOLERANCE[local_y.dtype]
    spec = y_spec(whole_y) if y_spec else ShardSpec.replicated(*whole_y.shape)
    assert_close(local_y, part(whole_y, spec, tp.rank), limit, f"{what}: result")
    if not local_y.requires_grad:
        return
    grad = gradient_part(whole_grad, spec, tp.rank).to(local_y.dtype)
    kept = grad.clone()
    local_y.backward(grad)

    assert torch.equal(local_x.detach(), before), f"{what}: the input was written to"
    assert torch.equal(grad, kept), f"{what}: the incoming gradient was written to"
    if x.requires_grad:
        assert local_x.grad is not None and whole_x.grad is not None
        assert local_x.grad.dtype == x.dtype
        expected = part(whole_x.grad, x_spec, tp.rank) if x_spec else whole_x.grad
        assert_close(local_x.grad, expected, limit, f"{what}: input gradient")
    for name, parameter_spec in parameter_specs(layer).items():
        parameter, whole = layer.get_parameter(name), weights[name].grad
        if name in frozen:
            assert parameter.grad is None, f"{what}: {name} is frozen but has a gradient"
            continue
        assert parameter.grad is not None, f"{what}: {name} has no gradient"
        assert whole is not None
        expected = part(whole, parameter_spec, tp.rank)
        assert_close(parameter.grad, expected, limit, f"{what}: gradient of {name}")


@contextmanager
def raises(kind: type[Exception], *words: str) -> Iterator[None]:
    """The block raises this exception, and its message contains these words; for use on a rank."""
    try:
        yield
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in {str(error)!r}"
        return
    raise AssertionError(f"no {kind.__name__} with {words}")
