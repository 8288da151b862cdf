"""A weight whose numbers stay in the quantised blocks of its file, and what it is multiplied by.

A few rows are multiplied by ggml's own kernels (:mod:`colrow.layers.ggml`), which round the
activations to 8 bits in blocks, as llama.cpp does. For many rows, and for fp64, some rows of the
weight at a time become plain numbers in a scratch matrix that stays in the caches, and torch
multiplies: exactly in fp64, in bf16 otherwise where the CPU has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.layers import ggml

FEW_ROWS = 12
"""So many rows at most are multiplied by ggml's kernels (benchmarks/quantised)."""
_SCRATCH_NUMBERS = 1 << 18


@dataclass(frozen=True, eq=False)
class Blocks:
    """Rows of a matrix in blocks of one type, as a GGUF file has them.

    Attributes:
        kind: number of the type, which ggml and GGUF files share.
        name: of the type, such as "Q4_1".
        data: ``[rows, bytes]`` uint8, contiguous; maybe a part of the mapped file.
    """

    kind: int
    name: str
    data: npt.NDArray[np.uint8]


class QuantisedWeight(Tensor):
    """A frozen matrix ``[out, in]`` that has a shape and no plain numbers.

    Its dtype is that of the activations that it is multiplied with. Layers multiply with it through
    :class:`colrow.layers.decoding.QuantisedKernel`; whoever takes it for a plain tensor gets a
    RuntimeError that names it.

    Args:
        blocks: its rows, one part below the other.
        columns: the columns of the blocks that are this rank's: where a shard is cut through
            blocks, others' stand before and behind them.
        width: columns of the blocks.
        label: name for messages.
    """

    # Asking for a dtype or a shape then costs what it does of any tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    blocks: tuple[Blocks, ...]
    columns: tuple[int, int]
    width: int
    label: str
    _products: dict[int, _Product]

    @staticmethod
    def __new__(
        cls: type[QuantisedWeight],
        blocks: tuple[Blocks, ...],
        columns: tuple[int, int],
        width: int,
        *,
        dtype: torch.dtype,
        label: str,
    ) -> QuantisedWeight:
        """As the class says."""
        rows = sum(each.data.shape[0] for each in blocks)
        shape = (rows, columns[1] - columns[0])
        made: QuantisedWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=torch.device("cpu"), requires_grad=False
        )
        made.blocks, made.columns, made.width, made.label = blocks, columns, width, label
        made._products = {}
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Nothing can be computed from it but another of its kind."""
        met = next(each for each in args if isinstance(each, QuantisedWeight))
        if func is not torch.ops.aten.detach.default:
            met.refuse(str(func))
        return cls(met.blocks, met.columns, met.width, dtype=met.dtype, label=met.label)

    def refuse(self, what: str) -> NoReturn:
        """Raises RuntimeError: it is no plain tensor."""
        raise RuntimeError(
            f"{self.label} stays in the blocks of its file ({self.kinds}) and cannot serve for "
            f"{what}: generate under torch.no_grad(), or load the model with plain weights "
            "(--weights fp32) to train, save or export it"
        )

    def __repr__(self, *_: object, **__: object) -> str:  # type: ignore[override]
        return f"QuantisedWeight({self.label}, {list(self.shape)}, {self.kinds})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantisedWeight:
        return self  # frozen, like the file

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.refuse("pickle")

    @property
    def kinds(self) -> str:
        """The types of its blocks."""
        return ", ".join(dict.fromkeys(each.name for each in self.blocks))

    @property
    def stored_bytes(self) -> int:
        """Memory of its blocks."""
        return sum(each.data.nbytes for each in self.blocks)

    def product(self, x: Tensor) -> Tensor:
        """``x W^T`` of ``[..., in]``, ``[..., out]``, in x's dtype."""
        rows = x.reshape(-1, self.shape[1])
        if rows.shape[0] > FEW_ROWS or x.dtype == torch.float64:
            y = self._by_scratch(rows)
        else:
            wide = rows.to(torch.float32).contiguous()
            y = wide.new_empty(rows.shape[0], self.shape[0])
            self.few_rows(wide, y)
        return y.to(x.dtype).view(*x.shape[:-1], self.shape[0])

    def few_rows(self, x: Tensor, out: Tensor) -> None:
        """``x W^T`` of ``[rows, in]`` into ``[rows, out]``; both contiguous and in fp32."""
        rows = x.numel() // self.shape[1]
        if rows not in self._products:
            self._products[rows] = _Product(self, rows)
        self._products[rows](x, out)

    def _by_scratch(self, x: Tensor) -> Tensor:
        """``x W^T`` of ``[rows, in]``, by some rows of the weight at a time."""
        given = x.to(_multiplied_in(x.dtype))
        out = x.new_empty(x.shape[0], self.shape[0])
        for first, weight in self.plain_rows(given.dtype):
            out[:, first : first + weight.shape[0]] = F.linear(given, weight)
        return out

    def plain_rows(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """All rows as plain numbers, some at a time: the first one's number, and ``[some, in]``.

        They are in memory that is used again for the next.
        """
        first = 0
        height = max(1, _SCRATCH_NUMBERS // self.width)
        wide = torch.empty(height, self.width)
        scratch = torch.empty(height, self.width, dtype=dtype) if dtype != wide.dtype else wide
        for each in self.blocks:
            for start in range(0, each.data.shape[0], height):
                part = each.data[start : start + height]
                some = part.shape[0]
                ggml.installed().dequantise(each.kind, part, wide[:some])
                if scratch is not wide:
                    scratch[:some] = wide[:some]
                yield first, scratch[:some, slice(*self.columns)]
                first += some

    def vectors(self, rows: Tensor) -> Tensor:
        """Some rows, ``[...]`` to ``[..., in]``: of an embedding."""
        (only,) = self.blocks
        taken = only.data[rows.reshape(-1).numpy()]
        wide = torch.empty(taken.shape[0], self.width)
        ggml.installed().dequantise(only.kind, taken, wide)
        found = wide[:, slice(*self.columns)]
        return found.to(self.dtype).view(*rows.shape, self.shape[1])


class _Product:
    """The product of so many rows with a weight, laid out once for ggml."""

    def __init__(self, weight: QuantisedWeight, rows: int) -> None:
        library = ggml.installed()
        self._graph = ggml.Graph(library, 1 + 2 * len(weight.blocks))
        self._input = self._graph.tensor(ggml.F32, (weight.width, rows))
        self._outputs: list[tuple[Any, int]] = []
        start, stride = 0, 4 * weight.shape[0]
        for each in weight.blocks:
            matrix = self._graph.tensor(each.kind, (weight.width, each.data.shape[0]), each.data)
            product = self._graph.apply("mul_mat", matrix, self._input)
            strides = product.contents.nb
            strides[1], strides[2], strides[3] = stride, stride * rows, stride * rows
            self._outputs.append((product, start))
            start += 4 * each.data.shape[0]
        self._padded: Tensor | None = None
        if weight.columns != (0, weight.width):
            with torch.inference_mode(False):
                self._padded = torch.zeros(rows, weight.width)
            self._own = self._padded[:, slice(*weight.columns)]

    def __call__(self, x: Tensor, out: Tensor) -> None:
        if self._padded is not None:  # others' columns are multiplied by zero
            self._own.copy_(x.view_as(self._own))
            x = self._padded
        start = out.data_ptr()
        self._graph.compute(
            (self._input, x.data_ptr()), *((y, start + offset) for y, offset in self._outputs)
        )


def _multiplied_in(dtype: torch.dtype) -> torch.dtype:
    if dtype != torch.float32:
        return dtype
    return torch.bfloat16 if _has_fast_bf16() else dtype


def _has_fast_bf16() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
