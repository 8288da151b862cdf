from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.profiler import profile

from colrow.bench.attribution import PREFIX, attribute
from colrow.layers.decoding import BlasKernel, Kernel, PackedKernel, has_fast_blas, lay_out_

NARROW, WIDE = 40, 56


def kernel(dtype: torch.dtype, weight: nn.Parameter) -> Kernel:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 on this processor")
    found = lay_out_(weight, blas=True)
    assert isinstance(found, PackedKernel if dtype == torch.bfloat16 else BlasKernel)
    return found


def parameter(rows: int, columns: int, dtype: torch.dtype) -> nn.Parameter:
    torch.manual_seed(rows)
    return nn.Parameter(torch.randn(rows, columns, dtype=dtype), requires_grad=False)


@pytest.mark.parametrize("shape", [(NARROW, WIDE), (WIDE, NARROW)])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_products_are_those_of_the_weight(
    shape: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    weight = parameter(*shape, dtype)
    before, bias = weight.clone(), torch.randn(shape[0], dtype=dtype)
    multiply = kernel(dtype, weight)
    assert torch.equal(weight, before)
    for lead in [(1,), (1, 1), (3,), (2, 3)]:
        x = torch.randn(*lead, shape[1], dtype=dtype)
        for added in (None, bias):
            expected = F.linear(
                x.double(), before.double(), None if added is None else bias.double()
            )
            found = multiply(x, weight, added)
            assert found.shape == expected.shape and found.dtype == dtype
            assert (found - expected).norm() < bound * expected.norm()
    out, x = torch.empty(shape[0], dtype=dtype), torch.randn(shape[1], dtype=dtype)
    expected = before.double() @ x.double()
    assert (multiply.row(x, weight, out) - expected).norm() < bound * expected.norm()
    assert (out - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_weights_that_change_later_count(dtype: torch.dtype, rows: int) -> None:
    weight, other = parameter(WIDE, NARROW, dtype), parameter(WIDE, NARROW, dtype) * 3
    multiply, x = kernel(dtype, weight), torch.randn(rows, NARROW, dtype=dtype)
    before = multiply(x, weight, None)
    assert torch.allclose(multiply(x, other, None), 3 * before, rtol=2e-2, atol=1e-1)
    weight.mul_(2)
    assert torch.allclose(multiply(x, weight, None), 2 * before, rtol=2e-2, atol=1e-1)
    assert not isinstance(copy.deepcopy(multiply), PackedKernel)


def test_autocast_means_what_it_means_elsewhere() -> None:
    weight = parameter(WIDE, NARROW, torch.float32)
    multiply, x = kernel(torch.float32, weight), torch.randn(3, NARROW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert multiply(x, weight, None).dtype == torch.bfloat16


def test_onednn_is_as_it_was() -> None:
    weight = parameter(WIDE, NARROW, torch.bfloat16)
    multiply = kernel(torch.bfloat16, weight)
    torch._C._set_mkldnn_enabled(False)
    try:
        multiply(torch.randn(1, NARROW, dtype=torch.bfloat16), weight, None)
        assert not torch._C._get_mkldnn_enabled()
    finally:
        torch._C._set_mkldnn_enabled(True)
    with pytest.raises(RuntimeError):
        multiply.row(torch.randn(3, dtype=torch.bfloat16), weight, torch.empty(WIDE))
    assert torch._C._get_mkldnn_enabled()


def test_threads_leave_onednn_as_it_was() -> None:
    weight = parameter(512, 512, torch.bfloat16)
    multiply, x = kernel(torch.bfloat16, weight), torch.randn(512, dtype=torch.bfloat16)

    def work(_: int) -> None:
        for _ in range(40):
            multiply.row(x, weight, torch.empty(512, dtype=torch.bfloat16))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(12)))
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_may_be_converted_afterwards(dtype: torch.dtype) -> None:
    layer = nn.Linear(NARROW, WIDE).requires_grad_(False)
    multiply = kernel(torch.float32, layer.weight)
    weight = layer.to(dtype).weight
    for x in (torch.randn(1, NARROW, dtype=dtype), torch.randn(3, NARROW, dtype=dtype)):
        assert torch.allclose(multiply(x, weight, None), F.linear(x, weight), rtol=2e-2, atol=1e-2)
    row = multiply.row(x[0], weight, torch.empty(WIDE, dtype=dtype))
    assert torch.allclose(row, F.linear(x[0], weight), rtol=2e-2, atol=1e-2)


def test_blas_is_left_alone_by_several_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert not has_fast_blas()
    finally:
        torch.set_num_threads(threads)


def test_a_profile_shows_its_products_as_matmuls() -> None:
    weight = parameter(WIDE, NARROW, torch.float32)
    multiply = kernel(torch.float32, weight)
    with profile() as trace, torch.profiler.record_function(f"{PREFIX}decode"):
        multiply(torch.randn(1, NARROW), weight, None)
    assert attribute(trace.function_events or (), cuda=False)["decode"].calls["matmul"] == 1
