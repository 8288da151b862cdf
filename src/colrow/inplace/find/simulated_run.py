"""What one run of a module in this process shows: the sums in it, its results, their gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from colrow.inplace.observe.following import following
from colrow.inplace.observe.watch import ValueWatch


@dataclass
class SimulatedRun:
    """What happened in one run of a module, whole or as a rank.

    Attributes:
        inputs: of each row-parallel layer, call by call.
        sums: what each row-parallel layer gave.
        results: the floating-point tensors that the module gave.
        leaves: what gradients are taken of: ("weight", layer), ("bias", layer), ("parameter",
            name), ("argument", key), ("cut", layer, call), ("direct", name) for the weights of
            layers, which nothing but the layers should use.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    results: list[Tensor] = field(default_factory=list)
    leaves: dict[Any, Tensor] = field(default_factory=dict)

    def leaf(self, x: Tensor, *name: Any) -> Tensor:
        """A copy of ``x`` of which gradients are taken, under this name."""
        self.leaves[name] = x = x.clone().requires_grad_()
        return x

    def gradients(self, cotangents: list[Tensor]) -> dict[Any, Tensor]:
        """The gradients of the leaves, given these gradients of the results."""
        pairs = [(y, c) for y, c in zip(self.results, cotangents, strict=True) if y.requires_grad]
        names = list(self.leaves)
        grads = torch.autograd.grad(
            [y for y, _ in pairs],
            [self.leaves[name] for name in names],
            [c for _, c in pairs],
            allow_unused=True,
        )
        return {
            name: torch.zeros_like(self.leaves[name]) if grad is None else grad
            for name, grad in zip(names, grads, strict=True)
            if grad is not None or name[0] != "direct"
        }


def watched_gradients(whole: SimulatedRun, watch: ValueWatch, cotangents: list[Tensor]) -> Any:
    """As :meth:`SimulatedRun.gradients`; what its backward pass reads is noted too."""
    watch.backward = True
    try:
        with following(watch):
            return whole.gradients(cotangents)
    finally:
        watch.backward = False
