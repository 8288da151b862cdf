"""What the modules of a parallelised model keep between passes."""

from __future__ import annotations

import weakref

import torch

from colrow.comm.group import ParallelGroup
from colrow.inplace.apply.gradients import ColumnEntry


def test_an_entry_lets_go_of_its_tensor_after_the_pass() -> None:
    entry, weight = (
        ColumnEntry(ParallelGroup.single("tp"), "layer"),
        torch.ones(3, requires_grad=True),
    )

    def run() -> weakref.ref[torch.Tensor]:
        x = weight * 2
        first, second = entry(x, "q"), entry(x, "k")
        assert first is second
        (first + second).sum().backward()
        return weakref.ref(x)

    assert run()() is None
    assert weight.grad is not None and weight.grad.tolist() == [4.0] * 3
