"""The choices that layers offer, as plain values: no torch, so that planning can use them too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from colrow.files import shown

Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_bloom", "relu"]
Position = Literal["rope", "learned", "alibi", "none"]
Scaling = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

_ABOVE_ZERO = (
    *("theta", "factor", "low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "attention_factor"),
)


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
        scaling: "default"; "linear" (positions divided by ``factor``); "dynamic" (``theta`` grows
            with sequences that are longer than the original positions); "llama3" (long wavelengths
            divided by ``factor``, short ones kept, a ramp between); "yarn" (the same with a ramp
            over the dimensions, Peng et al. 2023); "longrope" (a factor for each frequency, for
            sequences up to the original positions and for longer ones; Ding et al. 2024).
        factor, low_freq_factor, high_freq_factor, original_max_positions: of the scaling.
        beta_fast, beta_slow: of "yarn": rotations within the original positions from which on
            frequencies are kept, and below which they are divided by the factor.
        truncate: of "yarn": whether the ramp's ends are rounded to whole dimensions.
        attention_factor: of "yarn" and "longrope": what rotated queries and keys are multiplied by.
        short_factors, long_factors: of "longrope": ``dims / 2`` numbers each.
        interleaved: pairs of dimensions are (2i, 2i + 1), as in Cohere's, GLM's and DeepSeek's
            models; otherwise (i, i + dims / 2).
    """

    theta: float
    dims: int
    scaling: Scaling = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    interleaved: bool = False

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            _check_above_zero(name, getattr(self, name))
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
        if self.scaling == "dynamic" and self.dims == 2:
            raise ValueError("rope type 'dynamic' needs more than one pair of dimensions")
        if self.scaling == "yarn" and self.theta <= 1:
            raise ValueError(f"rope theta={self.theta}: must be above 1 for rope type 'yarn'")
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope truncate={shown(self.truncate)}: must be true or false")
        needed = self.dims // 2 if self.scaling == "longrope" else 0
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            if len(factors) != needed:
                raise ValueError(
                    f"rope {name} has {len(factors)} numbers: {needed} are needed for rope type "
                    f"{self.scaling!r} with {self.dims} rotating dimensions"
                )
            for factor in factors:
                _check_above_zero(name, factor)

    @property
    def by_length(self) -> bool:
        """Whether the rotations depend on the length of the whole sequence."""
        return self.scaling in ("dynamic", "longrope")


def _check_above_zero(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"rope {name}={shown(value)}: must be a number")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"rope {name}={shown(value)}: must be finite and above 0")
