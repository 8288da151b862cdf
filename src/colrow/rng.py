"""Random numbers addressed by position: element i of a stream is a function of (key, i) alone.

Any rank can draw just the elements that it holds, and gets what one device would have drawn there.
Initial weights, dropout masks and sampled tokens therefore do not depend on the tensor-parallel
size. The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which is counter-based: its
i-th output is a mixing function of key + i * gamma.

Values are made of integer operations and of fp64 +, -, *, / and square root, one at a time. These
round in one way only, so that a value is the same to the last bit wherever it lies in a tensor, for
any number of threads and on any device. (Library functions such as log and cos are not: their last
bit may differ between the vectorised middle and the scalar end of a loop.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from colrow.partition import ShardSpec

_GAMMA = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1
_SQRT_HALF = 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2) in fp64
_CHUNK = 1 << 18  # elements drawn at a time: temporaries stay in cache and out of the peak memory


def stream_key(seed: int, *names: object) -> int:
    """A 63-bit key for the stream with this seed and name; unrelated for any two names."""
    text = "\x1f".join([str(seed), *map(str, names)]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def derived_key(key: int | Tensor, *names: object) -> int | Tensor:
    """The key of another stream that belongs to ``key``; a tensor stays a tensor."""
    return _plus(key, stream_key(0, *names))


def draw_seed() -> int:
    """A seed from torch's default CPU generator: ranks that seeded it alike agree."""
    return int(torch.randint(2**62, (), device="cpu").item())


def bits(key: int | Tensor, index: Tensor) -> Tensor:
    """64 random bits for each element of ``index`` (int64), as int64."""
    x = _mixed(index * _signed(_GAMMA) + key)
    return x.bitwise_xor_(_shift(x, 31))


def uniform(key: int | Tensor, index: Tensor) -> Tensor:
    """Uniform on the open interval (0, 1) with 52 random bits, float64, at these positions."""
    return (_shift(bits(key, index), 12).to(torch.float64) + 0.5) * 2.0**-52


def uniform_between(key: int, index: Tensor, bound: float) -> Tensor:
    """Uniform on (-bound, bound) at these positions, float32."""
    return ((uniform(key, index) * 2 - 1) * bound).float()


def normal(key: int, index: Tensor) -> Tensor:
    """Standard normal at these positions (Box and Muller 1958), float64 rounded to float32."""
    random = bits(key, index)
    radius = _shift(random, 32).to(torch.float64).add_(0.5).mul_(2.0**-32)
    turn = random.bitwise_and_(0xFFFFFFFF).to(torch.float64).add_(0.5).mul_(2.0**-32)
    value = _log(radius).mul_(-2.0).sqrt_().mul_(_cos_of_turn(turn))
    return value.to(torch.float32)


def keep_mask(
    key: int | Tensor,
    p: float,
    *,
    rows: int,
    columns: int,
    first: int,
    stride: int,
    device: torch.device,
) -> Tensor:
    """False with probability ``p``: whether ``uniform(key, first + r * stride + c)`` is at least p.

    ``[rows, columns]`` bool. ``p`` is rounded to a multiple of 2^-31, so that the comparison needs
    only the highest 31 bits, which the last step of SplitMix64 leaves as they are.
    """
    share = min(round(p * 2**31), 2**31 - 1)
    threshold = (share << 33) - (1 << 63)  # both sides less 2^63: unsigned numbers as signed ones
    keep = torch.empty(rows, columns, dtype=torch.bool, device=device)
    # In pieces that stay in a CPU's cache; a compiler fuses the whole, a GPU has no such cache.
    whole = torch.compiler.is_compiling() or device.type != "cpu"
    width = columns if whole else min(columns, _CHUNK)
    height = rows if whole else min(rows, max(1, _CHUNK // max(1, width)))
    ramp = torch.arange(height, device=device)[:, None] * stride + torch.arange(
        width, device=device
    )
    ramp *= _signed(_GAMMA)
    for top in range(0, rows, max(1, height)):
        for left in range(0, columns, max(1, width)):
            part = keep[top : top + height, left : left + width]
            start = _plus(key, (first + top * stride + left) * _GAMMA)
            x = _mixed(ramp[: part.shape[0], : part.shape[1]] + start)
            part.copy_(x.bitwise_xor_(-(1 << 63)) >= threshold)
    return keep


def fill_shard_(out: Tensor, spec: ShardSpec, rank: int, draw: Callable[[Tensor], Tensor]) -> None:
    """Fills a shard with ``draw(positions)``, element by element as in the whole tensor.

    Args:
        out: the shard, 1-D to 3-D, of shape ``spec.local_shape(rank)``.
        draw: values for an int64 tensor of positions in the whole tensor (row-major), any shape.
    """
    if out.is_meta:
        return
    index = [torch.arange(length, device=out.device) for length in spec.shape]
    if spec.dim is not None:
        ranges = spec.global_ranges(rank)
        index[spec.dim] = torch.cat([torch.arange(a, b, device=out.device) for a, b in ranges])
    table = out.detach().flatten(0, -2) if out.dim() > 1 else out.detach().unsqueeze(0)
    columns = index[-1]
    rows = torch.zeros(1, dtype=torch.int64, device=out.device)
    for length, at in zip(spec.shape[:-1], index[:-1], strict=True):
        rows = (rows[:, None] * length + at).flatten()
    step = max(1, _CHUNK // max(1, columns.numel()))
    for first in range(0, rows.numel(), step):
        positions = rows[first : first + step, None] * spec.shape[-1] + columns
        table[first : first + step] = draw(positions).to(out.dtype)


def _log(x: Tensor) -> Tensor:
    """The natural logarithm of positive fp64 numbers, to about 1e-14.

    x = 2^k m with m from sqrt(1/2) to sqrt(2), and log m = 2 artanh s with s = (m - 1) / (m + 1),
    by its power series.
    """
    raw = x.view(torch.int64)
    k = (raw - _SQRT_HALF) >> 52
    m = (raw - (k << 52)).view(torch.float64)
    s = (m - 1.0).div_(m + 1.0)
    series = _power_series(s * s, [1 / (2 * n + 1) for n in range(8)])
    return series.mul_(s.mul_(2.0)).add_(k.to(torch.float64).mul_(math.log(2)))


def _cos_of_turn(turn: Tensor) -> Tensor:
    """cos(2 pi t) for t from 0 to 1 in fp64, to about 1e-13: sin(2 pi (|t - 1/2| - 1/4))."""
    angle = (turn - 0.5).abs_().sub_(0.25).mul_(2 * math.pi)
    series = _power_series(angle * angle, [(-1) ** n / math.factorial(2 * n + 1) for n in range(9)])
    return series.mul_(angle)


def _power_series(x: Tensor, coefficients: list[float]) -> Tensor:
    """The sum of coefficients[n] x^n."""
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result.mul_(x).add_(coefficient)
    return result


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64 but for its last step, in place."""
    x.bitwise_xor_(_shift(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    return x.bitwise_xor_(_shift(x, 27)).mul_(_signed(0x94D049BB133111EB))


def _shift(x: Tensor, places: int) -> Tensor:
    """Logical right shift of int64 (torch shifts the sign in)."""
    return (x >> places).bitwise_and_(_MASK64 >> places)


def _plus(key: int | Tensor, value: int) -> int | Tensor:
    """The sum modulo 2^64 as an int64."""
    if isinstance(key, Tensor):
        return key + _signed(value & _MASK64)
    return _signed((key + value) & _MASK64)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value
