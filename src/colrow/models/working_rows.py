"""Memory that the blocks of a pass for one token work in, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


class WorkingRows:
    """Tensors on the CPU by name and shape, zero at first."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._held: dict[object, Tensor] = {}

    def __call__(self, name: object, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The same tensor for the same name and shape."""
        key = (name, shape)
        if key not in self._held:
            with torch.inference_mode(False):  # passes outside of inference mode write to it too
                self._held[key] = torch.zeros(shape, dtype=dtype or self.dtype, device="cpu")
        return self._held[key]
