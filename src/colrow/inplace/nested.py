"""Nested tensors, whose rows have different lengths, through layers that know plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def by_features(multiply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``multiply(x)`` for ``[..., in]`` to ``[..., out]``; nested for a nested ``x``.

    The rows of a nested tensor go through it one behind the other, as one plain tensor.
    """
    if not x.is_nested:
        return multiply(x)
    if x.layout == torch.jagged:
        # With its own offsets, since torch adds jagged tensors of the same offsets alone.
        jagged: Any = x
        values = multiply(jagged.values())
        result: Tensor = torch.nested.nested_tensor_from_jagged(
            values, jagged.offsets(), jagged.lengths()
        )
        return result
    rows = x.unbind()
    flat = multiply(torch.cat([row.flatten(0, -2) for row in rows]))
    parts = flat.split([row.shape[:-1].numel() for row in rows])
    shaped = [part.view(*row.shape[:-1], -1) for part, row in zip(parts, rows, strict=True)]
    return torch.nested.as_nested_tensor(shaped)
