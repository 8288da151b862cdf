"""Experts that are stored in MXFP4, as gpt-oss is published, read as the matrices that they mean.

The format: Open Compute Project, "Microscaling formats (MX)", version 1.0, section 5.1. A block is
32 numbers of 4 bits (1 sign, 2 exponent, 1 mantissa) with one power of two for all.
"""

from __future__ import annotations

import torch

from colrow.checkpoint.reader import Ranges, TensorReader, select, selected_length

_BLOCKS, _SCALES = "_blocks", "_scales"
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127  # of the exponent that a scale is


class Mxfp4Reader(TensorReader):
    """A ``TensorReader`` over another one, in which pairs of tensors are single ones.

    ``X_blocks`` ``[experts, out, in / 32, 16]`` and ``X_scales`` ``[experts, out, in / 32]`` are
    ``X`` ``[experts, in, out]``, the form in which transformers stores plain weights. What 4 bits
    and a scale mean is exact in bf16 and wider formats. One expert is converted at a time, whole.

    Raises:
        ValueError: blocks without scales, or of other shapes.
    """

    def __init__(self, stored: TensorReader) -> None:
        self._stored = stored
        names = stored.names()
        self._shapes: dict[str, tuple[int, int, int]] = {}
        for name in names:
            whole = name.removesuffix(_BLOCKS)
            if whole == name:
                continue
            shape = stored.shape(name)
            scales = stored.shape(f"{whole}{_SCALES}") if f"{whole}{_SCALES}" in names else ()
            if len(shape) != 4 or shape[3] != 16 or scales != shape[:3]:
                raise ValueError(
                    f"{name} of {stored.description} has the shape {list(shape)} and scales of "
                    f"{list(scales)}: MXFP4 has [experts, out, in / 32, 16] and one scale for each "
                    "16 bytes"
                )
            self._shapes[whole] = (shape[0], 32 * shape[2], shape[1])
        parts = {f"{whole}{end}" for whole in self._shapes for end in (_BLOCKS, _SCALES)}
        self._names = (names - parts) | self._shapes.keys()
        self._last: tuple[str, int, torch.Tensor] | None = None

    @property
    def description(self) -> str:
        """Path and format, for messages."""
        return f"{self._stored.description}, MXFP4"

    def names(self) -> frozenset[str]:
        """The names of all tensors, those in MXFP4 without the endings of their parts."""
        return frozenset(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self._shapes[name] if name in self._shapes else self._stored.shape(name)

    def read(
        self,
        name: str,
        rows: Ranges | None = None,
        columns: Ranges | None = None,
        *,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Read these rows and columns, see ``TensorReader.read``; rows are experts here.

        Raises:
            ValueError: fp16, which holds fewer powers of two than the scales.
        """
        if name not in self._shapes:
            return self._stored.read(name, rows, columns, dtype=dtype)
        if dtype == torch.float16:
            raise ValueError(
                f"{name} of {self.description} has no place in float16, whose range is smaller: "
                "ask for bfloat16 or float32"
            )
        shape = self._shapes[name]
        experts, inner = select(name, shape, rows, columns)
        result = torch.empty(
            selected_length(experts), selected_length(inner), shape[2], dtype=dtype, device="cpu"
        )
        wanted = [expert for first, last in experts for expert in range(first, last)]
        for place, expert in zip(result, wanted, strict=True):
            whole = self._expert(name, expert)  # [out, in]
            place.copy_(torch.cat([whole[:, first:last] for first, last in inner], dim=1).t())
        return result

    def _expert(self, name: str, expert: int) -> torch.Tensor:
        """One expert's matrix ``[out, in]`` in fp32; the last one is kept."""
        if self._last is None or self._last[:2] != (name, expert):
            own = ((expert, expert + 1),)
            bits, scales = (
                self._stored.read(f"{name}{end}", own, dtype=torch.uint8)[0]
                for end in (_BLOCKS, _SCALES)
            )
            self._last = name, expert, dequantised(bits, scales)
        return self._last[2]

    def close(self) -> None:
        """Release the files."""
        self._last = None
        self._stored.close()


def dequantised(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What MXFP4 means, in fp32.

    Args:
        blocks: ``[out, in / 32, 16]`` uint8, of each byte the lower 4 bits first.
        scales: ``[out, in / 32]`` uint8, exponents of two plus 127.

    Returns:
        ``[out, in]``.
    """
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], device=blocks.device)
    codes = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).flatten(-2)  # [out, in / 32, 32]
    exponents = (scales.int() - _BIAS).unsqueeze(-1)
    return torch.ldexp(values[codes.long()], exponents).flatten(-2)


def is_mxfp4(reader: TensorReader) -> bool:
    """Whether a checkpoint has tensors in that format."""
    names = reader.names()
    return any(
        name.endswith(_BLOCKS) and f"{name.removesuffix(_BLOCKS)}{_SCALES}" in names
        for name in names
    )
