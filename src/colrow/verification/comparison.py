"""How far a result is from the one that it should be: the measure of every comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# A gradient whose norm is this share of the largest one's consists of rounding errors.
_NO_GRADIENT = 1e-12
SMALL_GRADIENT = 1e-4
"""A gradient is compared relative to its own norm, or to this share of the largest one's where that
is larger: an attention's key bias has a gradient of exactly 0, and of rounding errors in fact."""


def relative_error(
    value: Tensor, reference: Tensor, *, smallest: float = 0.0, masked: bool = False
) -> float:
    """``||value - reference|| / ||reference||`` in fp64; the norm of ``value`` where that is 0.

    A shape that differs, NaN and Inf give infinity.

    Args:
        smallest: relative to this where the norm of the reference is smaller.
        masked: infinities that both have in the same places, as masked results, are no error.
    """
    if value.shape != reference.shape:
        return math.inf
    expected = reference.detach().double()
    apart = value.detach().to(expected) - expected
    error, norm = norm_of(apart), norm_of(expected)
    if masked and not (math.isfinite(error) and math.isfinite(norm)):
        finite = torch.isfinite(expected)
        error = norm_of(apart[finite | (value.detach().to(expected) != expected)])
        norm = norm_of(expected[finite])
    error /= max(norm, smallest) or 1.0
    return math.inf if math.isnan(error) else error


def norm_of(tensor: Tensor) -> float:
    """Its 2-norm in fp64."""
    return float(torch.linalg.vector_norm(tensor.detach().double()))


def largest_norm(tensors: Iterable[Tensor]) -> float:
    """That of the largest one; 0 when there are none."""
    return max(map(norm_of, tensors), default=0.0)


def gradient_errors(
    grads: Mapping[str, Tensor], reference: Mapping[str, Tensor], *, small: float = SMALL_GRADIENT
) -> dict[str, float]:
    """The relative error of every gradient of the reference; infinity where there is none.

    A gradient that the reference does not have, and that is not 0, counts as wrong too.

    Args:
        small: share of the largest norm to which smaller gradients are compared.
    """
    largest = largest_norm(reference.values())
    errors = {
        name: norm_of(grad) and math.inf for name, grad in grads.items() if name not in reference
    }
    for name, grad in reference.items():
        if name in grads:
            errors[name] = relative_error(grads[name], grad, smallest=small * largest)
        else:
            errors[name] = math.inf if norm_of(grad) > _NO_GRADIENT * largest else 0.0
    return errors


def worst_of(errors: Mapping[str, float]) -> tuple[float, str]:
    """The largest error and of what; "nothing" when there are none."""
    name = max(errors, key=lambda name: errors[name], default="nothing")
    return errors.get(name, 0.0), name


def first_over(pairs: Iterable[tuple[str, Tensor, Tensor]], limit: float) -> str | None:
    """The first name whose value is off by more than ``limit``; None when none is.

    Args:
        pairs: name, value and reference of each layer, in the order of the forward pass.
    """
    for name, value, reference in pairs:
        if relative_error(value, reference) > limit:
            return name
    return None


@contextmanager
def first_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collects what each module gives when it is first called: a tensor, or a tuple's first one."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: object, output: object) -> None:
            if isinstance(output, tuple | list) and output:
                output = output[0]
            if isinstance(output, Tensor) and output.is_floating_point():
                outputs.setdefault(name, output.detach().clone())

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
