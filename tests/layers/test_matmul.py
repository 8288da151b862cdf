from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.layers import matmul

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """oneDNN is chosen whatever the processor; the inputs it was called with."""
    found = []
    original = torch.ops.mkldnn._linear_pointwise.default

    def counted(x: Tensor, *arguments: object) -> Tensor:
        found.append(x)
        result: Tensor = original(x, *arguments)
        return result

    monkeypatch.setattr(matmul, "_onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn._linear_pointwise, "default", counted)
    return found


def strided(*shape: int) -> Tensor:
    """Part of a larger tensor, in every dimension."""
    return torch.randn(*(2 * size + 1 for size in shape))[tuple(slice(1, None, 2) for _ in shape)]


@onednn
@pytest.mark.parametrize("shape", [(16, 24), (3, 40, 24), (2, 2, 5, 24)])
@pytest.mark.parametrize("lay_out", [Tensor.contiguous, lambda w: w.t().contiguous().t()])
def test_products_are_those_of_fp64(
    calls: list[Tensor], shape: tuple[int, ...], lay_out: object
) -> None:
    torch.manual_seed(0)
    assert callable(lay_out)
    cases = [
        (torch.randn(shape), lay_out(torch.randn(10, 24)), torch.randn(10)),
        (strided(*shape), strided(10, 24), strided(10)),
        (torch.randn(shape[-1]).expand(shape), lay_out(torch.randn(10, 24)), None),
    ]
    with torch.no_grad():
        for x, weight, bias in cases:
            expected = F.linear(
                x.double(), weight.double(), None if bias is None else bias.double()
            )
            torch.testing.assert_close(
                matmul.linear(x, weight, bias).double(), expected, rtol=0, atol=2e-5
            )
            grad = strided(*shape[:-1], 10)
            torch.testing.assert_close(
                matmul.input_gradient(grad, weight).double(),
                grad.double() @ weight.double(),
                rtol=0,
                atol=2e-5,
            )
    assert len(calls) == 2 * len(cases)


@onednn
def test_gradients_other_dtypes_and_single_rows_take_torchs_own_way(calls: list[Tensor]) -> None:
    weight = torch.randn(10, 24, requires_grad=True)
    matmul.linear(torch.ones(16, 24), weight).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((10, 24), 16.0))
    with torch.no_grad():
        assert matmul.linear(torch.ones(15, 24), weight).shape == (15, 10)
        assert matmul.linear(torch.ones(16, 24).double(), weight.double()).dtype == torch.float64
        assert matmul.linear(torch.ones(16, 24).bfloat16(), weight.bfloat16()).shape == (16, 10)
        assert matmul.linear(torch.ones(0, 24), weight).shape == (0, 10)
        assert matmul.linear(torch.ones(16, 0), torch.ones(10, 0)).abs().max() == 0
    assert not calls


def test_the_choice_is_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    processors = {"vendor_id\t: AuthenticAMD\n": True, "vendor_id\t: GenuineIntel\n": False}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for text, expected in processors.items():
        monkeypatch.setattr(matmul.Path, "read_text", lambda *_, text=text, **__: text)
        for capability in ("AVX512", "AVX2"):
            monkeypatch.setattr(
                torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability
            )
            matmul._onednn_is_faster.cache_clear()
            assert matmul._onednn_is_faster() == (expected and capability == "AVX512")
    matmul._onednn_is_faster.cache_clear()
