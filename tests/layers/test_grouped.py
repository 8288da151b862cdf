"""Matmuls of many experts: one kernel and one after the other give the same."""

from __future__ import annotations

import pytest
import torch

from colrow.layers import grouped
from tests.layers.dense import assert_close, random


@pytest.mark.cpu_only("both ways are taken on the CPU")
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_one_kernel_gives_what_single_matmuls_give(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, limit: float
) -> None:
    counts, found = [3, 0, 7, 1], []
    for one in (False, True):
        monkeypatch.setattr(grouped, "_one_kernel", lambda *_, one=one: one)
        rows = random(11, 16, dtype=dtype).requires_grad_()
        weights = random(4, 8, 16, seed=2, dtype=dtype).requires_grad_()
        result = grouped.grouped_linear(rows, weights, counts)
        result.backward(random(11, 8, seed=3, dtype=dtype))
        found.append((result, rows.grad, weights.grad))
    for single, kernel, what in zip(*found, ("result", "rows", "weights"), strict=True):
        assert single is not None and kernel is not None
        assert_close(kernel, single, limit, what)
    start = 0
    for expert, count in enumerate(counts):
        part = random(11, 16, dtype=dtype)[start : start + count].double()
        expected = part @ random(4, 8, 16, seed=2, dtype=dtype)[expert].double().T
        assert_close(found[0][0][start : start + count], expected, limit, f"expert {expert}")
        start += count
