"""torch.nn's transformers, whose fused kernels take whole weights, against themselves whole."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.comm.group import ParallelGroup
from tests.inplace.test_parallelize import mesh_of
from tests.ranks import RankPool

IDS = torch.arange(12).view(2, 6)
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
CAUSAL = torch.triu(torch.ones(6, 6, dtype=torch.bool), diagonal=1)
LIMIT = 1e-10


class Encoder(nn.Module):
    """Tokens through a stack that ends with a norm, and optionally through a lone layer."""

    def __init__(self, *, lone: bool = False, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 24)
        options = {"batch_first": True} | options
        layer = nn.TransformerEncoderLayer(24, 4, 36, 0.0, **options)
        norm = None if lone else nn.LayerNorm(24)
        self.stack = layer if lone else nn.TransformerEncoder(layer, 2, norm)
        self.head = nn.Linear(24, 31)

    def forward(self, ids: Tensor, padding: Tensor | None = None, mask: Any = None) -> Any:
        return self.head(self.stack(self.embedding(ids), mask, src_key_padding_mask=padding))


class Both(nn.Module):
    """An encoder and a decoder that sees its padding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 24)
        self.both = nn.Transformer(24, 4, 1, 1, 36, 0.0, batch_first=True, **options)
        self.head = nn.Linear(24, 31)

    def forward(self, ids: Tensor, padding: Tensor | None = None, mask: Any = None) -> Any:
        x = self.embedding(ids)
        y = self.both(
            x,
            self.embedding(ids + 3),
            mask,
            CAUSAL,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return self.head(y)


class Heads(nn.Module):
    """Attention alone, whose kernel takes its four matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, ids: Tensor, padding: Tensor | None = None, mask: Any = None) -> Any:
        x = self.embedding(ids)
        y = self.attention(x, x, x, padding, attn_mask=mask)[0]
        return y + self.down(self.up(y).relu())


MODELS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (Encoder, {}),
    (Encoder, {"norm_first": True, "activation": "gelu"}),
    (Encoder, {"lone": True}),
    (Encoder, {"batch_first": False}),
    (Both, {}),
    (Both, {"norm_first": True}),
    (Heads, {}),
]
CALLS: list[dict[str, Tensor]] = [{}, {"padding": PADDING}, {"mask": CAUSAL}]


def results_of(model: nn.Module, transposed: bool) -> list[Tensor]:
    """Eval mode without and with gradients, and training; the gradient last."""
    found = []
    ids = IDS.t() if transposed else IDS
    for call in CALLS:
        with torch.no_grad():
            found.append(model.eval()(ids, **call))
        found.append(model(ids, **call))
        found.append(model.train()(ids, **call))
    return found


def check(tp: ParallelGroup, number: int, padded: bool, dtype: torch.dtype) -> None:
    cls, options = MODELS[number]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls(**options).to(dtype).eval()
        transposed = options.get("batch_first") is False
        expected = results_of(model, transposed)
        inputs = {"ids": IDS.t() if transposed else IDS} | ({"padding": PADDING} if padded else {})
        before = {n: p.shape for n, p in model.named_parameters()}
        colrow.parallelize(model, mesh_of(tp), example_inputs=inputs)
        results = results_of(model, transposed)
    split = {n for n, p in model.named_parameters() if p.shape != before[n]}
    assert any("linear2" in n or "down" in n for n in split)
    assert torch.backends.mha.get_fastpath_enabled()
    limit = LIMIT if dtype == torch.float64 else 1e-4
    for y, other in zip(results, expected, strict=True):
        torch.testing.assert_close(y, other, rtol=limit, atol=limit)


def check_all(tp: ParallelGroup, numbers: list[int], padded: bool) -> None:
    for number in numbers:
        check(tp, number, padded, torch.float64)


@pytest.mark.parametrize(("n", "numbers"), [(2, [0, 2, 4, 6]), (3, [0, 1, 3, 5])])
def test_masks_and_modes(ranks: RankPool, n: int, numbers: list[int]) -> None:
    ranks(n, check_all, numbers, n == 2)


def test_padded_rows_in_fp32(ranks: RankPool) -> None:
    ranks(2, check, 0, True, torch.float32)


def test_packing_leaves_zeros_in_padded_rows() -> None:
    # What check() compares with: the norm's bias is all that such rows have.
    model = Encoder().eval()
    with torch.no_grad():
        packed = model(IDS, PADDING)
    torch.testing.assert_close(packed[1, 4], packed[1, 5])
    assert not torch.allclose(model(IDS, PADDING)[1, 4], packed[1, 4], atol=1e-3)
