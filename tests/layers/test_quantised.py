"""Products with weights that stay in GGUF's blocks, against the gguf package's own numbers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Kind
from torch import nn

from colrow.comm.group import ParallelGroup
from colrow.layers import ggml
from colrow.layers.column import ColumnParallelLinear
from colrow.layers.decoding import QuantisedKernel
from colrow.layers.embedding import VocabParallelEmbedding
from colrow.layers.quantised import FEW_ROWS, Blocks, QuantisedWeight

pytestmark = pytest.mark.skipif(ggml.library() is None, reason="libggml-python is not installed")

OUT, IN = 24, 512
ROUNDED = 3e-2  # of activations to 8 bits, where blocks of random bytes cancel each other
FLOATS = [Kind.F32, Kind.F16, Kind.BF16]
# Products round what they multiply with to 8 bits, or to the type of the weight.
KINDS = [
    *FLOATS,
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
    *(Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ1_S, Kind.IQ1_M),
    *(Kind.IQ4_NL, Kind.IQ4_XS, Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4),
]


def stored(kind: Kind, rows: int = OUT) -> npt.NDArray[np.uint8]:
    """Numbers as a file has them; for kinds that need a search, any bytes with finite scales."""
    generator = np.random.default_rng(int(kind))
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    if kind in (*FLOATS, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0):
        normal = generator.standard_normal((rows, IN), dtype=np.float32)
        found: npt.NDArray[Any] = gguf.quants.quantize(normal, kind)
        return found.view(np.uint8).reshape(rows, -1)
    return generator.integers(0, 0x3C, (rows, IN // numbers * size), dtype=np.uint8)


def weight(
    data: npt.NDArray[np.uint8], kind: Kind, columns: tuple[int, int] = (0, IN)
) -> QuantisedWeight:
    blocks = (Blocks(int(kind), kind.name, data),)
    return QuantisedWeight(blocks, columns, IN, dtype=torch.float32, label="w")


def numbers(data: npt.NDArray[np.uint8], kind: Kind) -> torch.Tensor:
    flat = data.view({Kind.F32: np.float32, Kind.F16: np.float16}.get(kind, np.uint8))
    return torch.from_numpy(np.array(gguf.quants.dequantize(flat, kind), dtype=np.float64))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_of_block(kind: Kind) -> None:
    data = stored(kind)
    plain, held = numbers(data, kind), weight(data, kind)
    assert plain.isfinite().all() and plain.std() > 0
    assert (held.shape, held.dtype, held.kinds) == ((OUT, IN), torch.float32, kind.name)
    decoded = torch.cat([rows.clone() for _, rows in held.plain_rows(torch.float64)])
    assert error(decoded, plain) < 1e-7
    kernel, generator = QuantisedKernel(), torch.Generator().manual_seed(0)
    for rows in (1, 2, FEW_ROWS, FEW_ROWS + 1):
        x = torch.randn(rows, IN, generator=generator, dtype=torch.float64)
        exact = kernel(x, held, None)
        assert error(exact, x @ decoded.T) < 1e-14
        for dtype in (torch.float32, torch.bfloat16):
            rounded = kernel(x.to(dtype), held, None)
            assert rounded.dtype == dtype
            assert error(rounded, exact) < ROUNDED
    row = kernel.row(x[0].float(), held, torch.empty(OUT))
    assert torch.equal(row, kernel(x[:1].float(), held, None)[0])
    cut = weight(data, kind, (40, 300))  # through blocks, others' columns before and behind
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, ROUNDED)):
        found = kernel(x[:2, 40:300].to(dtype), cut, None)
        assert error(found, x[:2, 40:300] @ decoded[:, 40:300].T) < bound


def test_parts_of_several_types_below_each_other() -> None:
    kinds = (Kind.Q4_K, Kind.F32, Kind.Q8_0)
    parts = [stored(kind, rows) for kind, rows in zip(kinds, (3, 5, 2), strict=True)]
    blocks = tuple(Blocks(int(k), k.name, d) for k, d in zip(kinds, parts, strict=True))
    held = QuantisedWeight(blocks, (0, IN), IN, dtype=torch.float32, label="w")
    plain = torch.cat([numbers(d, k) for d, k in zip(parts, kinds, strict=True)])
    assert held.kinds == "Q4_K, F32, Q8_0" and held.stored_bytes == sum(p.nbytes for p in parts)
    for rows in (1, 3, 40):
        x = torch.randn(2, rows, IN)
        found = QuantisedKernel()(x, held, torch.ones(10))
        assert error(found, x.double() @ plain.T + 1) < ROUNDED


def test_layers_multiply_with_blocks_and_refuse_to_train() -> None:
    alone = ParallelGroup.single()
    data = stored(Kind.Q5_1)
    plain = numbers(data, Kind.Q5_1).float()
    layer = ColumnParallelLinear(IN, OUT, alone, bias=True)
    embedding = VocabParallelEmbedding(OUT, IN, alone)
    layer.weight = nn.Parameter(weight(data, Kind.Q5_1), requires_grad=False)
    embedding.weight = nn.Parameter(weight(data, Kind.Q5_1), requires_grad=False)
    layer.kernel = QuantisedKernel()
    x, ids = torch.randn(2, 3, IN), torch.tensor([[3, 0], [23, 3]])
    assert isinstance(layer.weight, QuantisedWeight)
    with torch.no_grad():
        assert error(layer(x), F.linear(x, plain, layer.bias).double()) < ROUNDED
        assert error(embedding(ids), plain[ids].double()) < 1e-7
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        assert torch.equal(copied(x), layer(x))
    refused = "w stays in the blocks of its file"
    for use in (
        lambda: layer(x),
        lambda: layer.weight + 1,
        lambda: layer.weight.sum(),
        lambda: layer.double(),
        lambda: pickle.dumps(layer.state_dict()),
        lambda: torch.save(layer.state_dict(), "/dev/null"),
    ):
        with pytest.raises((RuntimeError, TypeError), match=refused):
            use()
    layer.weight = nn.Parameter(plain * 2, requires_grad=False)
    with torch.no_grad():  # the kernel takes the weight that is there
        assert torch.equal(layer(x), F.linear(x, plain * 2, layer.bias))
