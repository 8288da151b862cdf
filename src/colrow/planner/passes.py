"""Seconds by kind of work, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Seconds:
    """Time by kind of work.

    Attributes:
        matmul: of the linear layers.
        attention: scores, softmax, weighted sum.
        elementwise: norms, activations, dropout, residuals, the loss, gradient accumulation.
        weight_gradients: the part of ``matmul`` beside which a collective can run.
    """

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    weight_gradients: float = 0.0

    @property
    def total(self) -> float:
        """Everything."""
        return self.matmul + self.attention + self.elementwise

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
            self.weight_gradients + other.weight_gradients,
        )

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(
            self.matmul * factor,
            self.attention * factor,
            self.elementwise * factor,
            self.weight_gradients * factor,
        )


@dataclass(frozen=True)
class Pass:
    """Forward and backward, and what backward computes a second time."""

    forward: Seconds
    backward: Seconds
    recompute: Seconds = Seconds()
