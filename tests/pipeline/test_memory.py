"""Bytes that autograd keeps, and how many microbatches' of them each schedule keeps on a stage."""

from __future__ import annotations

import torch
from torch import nn

from colrow.pipeline.memory import KeptActivations


def test_a_storage_counts_once_until_the_last_has_let_go() -> None:
    linear = nn.Linear(4, 8, bias=False)
    x = torch.randn(10, 4)
    with KeptActivations(linear.parameters()) as kept:
        y = linear(x)  # keeps x, and the weight, which does not count
        assert kept.bytes == 10 * 4 * 4
        z = y.view(-1).exp().sum()  # keeps the exponential; the view keeps nothing
        assert kept.bytes == 10 * 4 * 4 + 80 * 4
        again = linear(x)  # the same x
        assert kept.bytes == 10 * 4 * 4 + 80 * 4
        z.backward()
        assert kept.bytes == 10 * 4 * 4
        again.sum().backward()
        assert (kept.bytes, kept.peak_bytes) == (0, 10 * 4 * 4 + 80 * 4)


def test_what_is_never_needed_is_let_go_too() -> None:
    x = torch.randn(5, requires_grad=True)
    with KeptActivations() as kept:
        y = (x * 2).exp()
        assert kept.bytes == 5 * 4
        del y
    assert kept.bytes == 0
