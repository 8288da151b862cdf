"""The MLP's activation functions by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.layers.options import Activation, ClampedGate


def _gelu_bloom(x: Tensor) -> Tensor:
    """The tanh form with the rounded constant that BLOOM was trained with."""
    return 0.5 * x * (1.0 + torch.tanh(0.79788456 * x * (1.0 + 0.044715 * x * x)))


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_bloom": _gelu_bloom,
    "relu": F.relu,
}


def gated(gate: Tensor, up: Tensor, activation: Activation, clamped: ClampedGate | None) -> Tensor:
    """What a gated MLP computes of its two halves: ``act(gate) * up``, or as ``clamped`` says."""
    if clamped is None:
        return ACTIVATIONS[activation](gate) * up
    gate = gate.clamp(max=clamped.limit)
    up = up.clamp(-clamped.limit, clamped.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * clamped.alpha))
