"""Training in less memory: a narrower number format, and recomputation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full"]


@contextmanager
def cast_parameters(modules: list[nn.Module], dtype: torch.dtype | None) -> Iterator[None]:
    """Inside it, the parameters of these modules are their casts; gradients flow to the originals.

    Parameters that have the dtype stay. A parameter that two modules share is cast once.
    """
    swapped: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    casts: dict[int, Tensor] = {}
    try:
        for module in [m for outer in modules for m in outer.modules()] if dtype else []:
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


def recomputed(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The function's result, for whose backward the arguments are kept and the rest computed again.

    Dropout masks are addressed by key, so that they come out the same without torch's generators.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    result: Tensor = checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
    )
    return result
