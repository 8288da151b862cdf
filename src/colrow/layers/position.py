"""Rotary position embedding and ALiBi slopes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from colrow.layers.options import RopeConfig


class KeepsTables(nn.Module):
    """A layer with tables of positions, which are buffers that no file holds.

    They stay in their own dtype whatever the layer is converted to, and are there again after
    ``to_empty``.
    """

    def _tables(self) -> dict[str, Tensor | None]:
        """The tables by name, made on the CPU for equal bits."""
        raise NotImplementedError

    def _make_tables(self) -> None:
        """On the parameters' device, or the CPU for meta."""
        place = next(self.parameters()).device
        place = torch.device("cpu") if place.type == "meta" else place
        for name, table in self._tables().items():
            self.register_buffer(name, None if table is None else table.to(place), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Also behind ``to``, ``half`` and ``to_empty``, which would narrow or wipe the tables."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._make_tables()
        return self


def rope_frequencies(
    config: RopeConfig, device: torch.device | str | None = None, *, length: int = 0
) -> Tensor:
    """Rotation per position of each pair of dimensions, ``[dims / 2]`` fp32 (Su et al. 2021).

    "llama3" scaling as published with Llama 3.1: wavelengths beyond ``original_max_positions /
    low_freq_factor`` are stretched by ``factor``, those below ``original_max_positions /
    high_freq_factor`` are kept, in between the two are interpolated. The others as in transformers.

    Args:
        length: positions of the whole sequence, which "dynamic" and "longrope" depend on.
    """
    exponent = torch.arange(0, config.dims, 2, dtype=torch.float32, device=device) / config.dims
    if config.scaling == "longrope":
        long = length > config.original_max_positions
        factors = config.long_factors if long else config.short_factors
        by_pair = torch.tensor(factors, dtype=torch.float32, device=device)
        return 1.0 / (by_pair * config.theta**exponent)
    if config.scaling == "dynamic" and length > config.original_max_positions:
        return 1.0 / (_grown_theta(config, length).to(device) ** exponent)
    wavelengths = config.theta**exponent
    frequency = 1.0 / wavelengths
    if config.scaling == "linear":
        return frequency / config.factor
    if config.scaling == "llama3":
        wavelength = 2 * math.pi / frequency
        low, high = config.low_freq_factor, config.high_freq_factor
        kept = (config.original_max_positions / wavelength - low) / (high - low)
        kept = kept.clamp(0.0, 1.0)
        return (1 - kept) * frequency / config.factor + kept * frequency
    if config.scaling == "yarn":
        kept = 1 - _yarn_ramp(config, device)
        return 1.0 / (config.factor * wavelengths) * (1 - kept) + frequency * kept
    return frequency


def _grown_theta(config: RopeConfig, length: int) -> Tensor:
    """The base of "dynamic" scaling for a sequence of this length; in fp32, as in transformers."""
    longest = torch.tensor(float(length), dtype=torch.float32)
    growth = config.factor * longest / config.original_max_positions - (config.factor - 1)
    return config.theta * growth ** (config.dims / (config.dims - 2))


def _yarn_ramp(config: RopeConfig, device: torch.device | str | None) -> Tensor:
    """How much of each frequency is divided by the factor, ``[dims / 2]`` (Peng et al. 2023)."""
    dims, original = config.dims, config.original_max_positions

    def turning(rotations: float) -> float:
        """The dimension that rotates so often within the original positions."""
        ratio = math.log(original / (rotations * 2 * math.pi))
        return dims * ratio / (2 * math.log(config.theta))

    low, high = turning(config.beta_fast), turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(dims // 2, dtype=torch.float32, device=device)
    return ((pairs - low) / (high - low)).clamp(0, 1)


def rope_tables(
    config: RopeConfig, frequencies: Tensor, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``cos`` and signed ``sin`` for these positions, each ``[..., sequence, 1, dims]``.

    Of each pair of dimensions the first has a negative ``sin``, as :func:`apply_rope` needs it.

    Computed in fp32 (fp64 for fp64 activations) whatever ``dtype`` they are returned in, since
    angles reach max_positions radians.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions.to(wide)[..., None] * frequencies.to(wide)
    cos, sin = angles.cos(), angles.sin()
    if config.attention_factor != 1:
        cos, sin = cos * config.attention_factor, sin * config.attention_factor
    if config.interleaved:
        cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return cos.unsqueeze(-2).to(dtype), sin.unsqueeze(-2).to(dtype)


def apply_rope(x: Tensor, tables: tuple[Tensor, Tensor], *, interleaved: bool = False) -> Tensor:
    """Rotates the first ``dims`` of each head; ``x`` is ``[batch, sequence, heads, head_dim]``.

    Pairs are (i, i + dims / 2), the convention of GPT-NeoX and of most Hugging Face checkpoints, or
    (2i, 2i + 1) where they are interleaved.
    """
    cos, sin = tables
    dims = cos.shape[-1]
    rotating, rest = (x, None) if dims == x.shape[-1] else (x[..., :dims], x[..., dims:])
    if interleaved:
        swapped = rotating.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        first, second = rotating.chunk(2, dim=-1)
        swapped = torch.cat([second, first], dim=-1)
    # Both products are rounded: a fused multiply-add of one of them shows in fp32 gradients.
    turned = (rotating * cos).add_(swapped.mul_(sin))
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
