"""Rotary position embedding and ALiBi slopes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from colrow.layers.options import RopeConfig


def rope_frequencies(config: RopeConfig, device: torch.device | str | None = None) -> Tensor:
    """Rotation per position of each pair of dimensions, ``[dims / 2]`` fp32 (Su et al. 2021).

    "llama3" scaling as published with Llama 3.1: wavelengths beyond ``original_max_positions /
    low_freq_factor`` are stretched by ``factor``, those below ``original_max_positions /
    high_freq_factor`` are kept, in between the two are interpolated.
    """
    exponent = torch.arange(0, config.dims, 2, dtype=torch.float32, device=device) / config.dims
    frequency = 1.0 / (config.theta**exponent)
    if config.scaling == "linear":
        return frequency / config.factor
    if config.scaling == "llama3":
        wavelength = 2 * math.pi / frequency
        low, high = config.low_freq_factor, config.high_freq_factor
        kept = (config.original_max_positions / wavelength - low) / (high - low)
        kept = kept.clamp(0.0, 1.0)
        return (1 - kept) * frequency / config.factor + kept * frequency
    return frequency


def rope_tables(
    frequencies: Tensor, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``cos`` and signed ``sin`` for these positions, each ``[..., sequence, 1, dims]``.

    The first half of ``sin`` is negative, as :func:`apply_rope` needs it.

    Computed in fp32 (fp64 for fp64 activations) whatever ``dtype`` they are returned in, since
    angles reach max_positions radians.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions.to(wide)[..., None] * frequencies.to(wide)
    cos, sin = angles.cos(), angles.sin()
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return cos.unsqueeze(-2).to(dtype), sin.unsqueeze(-2).to(dtype)


def apply_rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the first ``dims`` of each head; ``x`` is ``[batch, sequence, heads, head_dim]``.

    Pairs are (i, i + dims / 2), the convention of GPT-NeoX and of Hugging Face checkpoints.
    """
    cos, sin = tables
    dims = cos.shape[-1]
    rotating, rest = (x, None) if dims == x.shape[-1] else (x[..., :dims], x[..., dims:])
    first, second = rotating.chunk(2, dim=-1)
    # Both products are rounded: a fused multiply-add of one of them shows in fp32 gradients.
    turned = (rotating * cos).add_(torch.cat([second, first], dim=-1).mul_(sin))
    return turned if rest is None else torch.cat([turned, rest], dim=-1)


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """Slope of each head's linear bias, ``[num_heads]`` fp64 (Press et al. 2021, section 3).

    A geometric sequence from 2^(-8/n); for a head count n that is no power of two, the slopes of
    the power below it, then every other one of the power above it.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / below) for i in range(num_heads - below)]
    return torch.tensor(slopes, dtype=torch.float64, device=device)
