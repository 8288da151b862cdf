"""Training in less memory: a narrower number format, and recomputation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")
Recompute = Literal["none", "selective", "full"]


@contextmanager
def cast_parameters(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[None]:
    """Inside it, these modules' own parameters are their casts; gradients flow to the originals.

    Parameters that have the dtype stay. A parameter that two modules share is cast once.
    """
    swapped: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    casts: dict[int, Tensor] = {}
    try:
        for module in modules if dtype else ():
            parameters: dict[str, Any] = module._parameters
            for name, parameter in list(parameters.items()):
                if parameter is not None and parameter.dtype != dtype:
                    cast = casts.setdefault(id(parameter), parameter.to(dtype))
                    swapped.append((parameters, name, parameter))
                    parameters[name] = cast
        yield
    finally:
        for parameters, name, parameter in swapped:
            parameters[name] = parameter


def recomputed(function: Callable[..., T], *args: Any, draws: bool = False, **kwargs: Any) -> T:
    """The function's result, for whose backward the arguments are kept and the rest computed again.

    Args:
        draws: dropout takes torch's random numbers, which are then those of the first time. The
            decoder's masks are addressed by key, and come out the same without.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    result: T = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)
    return result
