"""The choices that layers offer, as plain values: no torch, so that planning can use them too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from colrow.files import shown

Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_bloom", "relu"]
Position = Literal["rope", "learned", "alibi", "none"]


@dataclass(frozen=True)
class ClampedGate:
    """A gate that takes part as ``(up + 1) * gate * sigmoid(alpha * gate)`` (gpt-oss).

    Attributes:
        alpha: how steep the sigmoid is.
        limit: gates are at most this, and what passes them lies within it on both sides.
    """

    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021).

    Attributes:
        theta: base of the frequencies.
        dims: how many of a head's dimensions rotate; the rest pass unchanged.
        scaling: "default", "linear" (positions divided by ``factor``) or "llama3" (long
            wavelengths divided by ``factor``, short ones kept, a ramp between).
        factor, low_freq_factor, high_freq_factor, original_max_positions: of the scaling.
    """

    theta: float
    dims: int
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"rope {name}={shown(value)}: must be a number")
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"rope {name}={shown(value)}: must be finite and above 0")
        if self.low_freq_factor > self.high_freq_factor:
            raise ValueError(
                f"rope low_freq_factor={self.low_freq_factor} is above high_freq_factor="
                f"{self.high_freq_factor}: no wavelengths lie between the two"
            )
        for name in ("dims", "original_max_positions"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"rope {name}={shown(value)}: must be a whole number")
        if self.original_max_positions < 1:
            raise ValueError(f"rope original_max_positions={self.original_max_positions}: below 1")
        if self.dims < 2 or self.dims % 2:
            raise ValueError(f"rotary positions turn pairs of dimensions: {self.dims} is not even")
