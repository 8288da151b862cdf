"""Random numbers addressed by position: element i of a stream is a function of (key, i) alone.

Any rank can draw just the elements that it holds, and gets what one device would have drawn there.
Initial weights, dropout masks and sampled tokens therefore do not depend on the tensor-parallel
size. The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which is counter-based: its
i-th output is a mixing function of key + i * gamma.
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
_CHUNK = 1 << 18  # elements drawn at a time: temporaries stay in cache and out of the peak memory


def stream_key(seed: int, *names: object) -> int:
    """A 63-bit key for the stream with this seed and name; unrelated for any two names."""
    text = "\x1f".join([str(seed), *map(str, names)]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def derived_key(key: int | Tensor, *names: object) -> int | Tensor:
    """The key of another stream that belongs to ``key``; a tensor stays a tensor."""
    if isinstance(key, Tensor):
        return key + stream_key(0, *names)
    return _signed((key + stream_key(0, *names)) & _MASK64)


def draw_seed() -> int:
    """A seed from torch's default CPU generator: ranks that seeded it alike agree."""
    return int(torch.randint(2**62, (), device="cpu").item())


def bits(key: int | Tensor, index: Tensor) -> Tensor:
    """64 random bits for each element of ``index`` (int64), as int64."""
    x = index * _signed(_GAMMA) + key
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def uniform(key: int | Tensor, index: Tensor) -> Tensor:
    """Uniform on the open interval (0, 1) with 52 random bits, float64, at these positions."""
    return (_shift(bits(key, index), 12).to(torch.float64) + 0.5) * 2.0**-52


def uniform_between(key: int, index: Tensor, bound: float) -> Tensor:
    """Uniform on (-bound, bound) at these positions, float32."""
    return ((uniform(key, index) * 2 - 1) * bound).float()


def normal(key: int, index: Tensor) -> Tensor:
    """Standard normal at these positions (Box and Muller 1958), float64 rounded to float32."""
    random = bits(key, index)
    radius = (_shift(random, 32).to(torch.float64) + 0.5) * 2.0**-32
    angle = ((random & 0xFFFFFFFF).to(torch.float64) + 0.5) * 2.0**-32
    value = torch.sqrt(-2.0 * torch.log(radius)) * torch.cos(2.0 * math.pi * angle)
    # The last bit of log and cos may depend on the position in a vector register; it goes here.
    return value.to(torch.float32)


def fill_shard_(out: Tensor, spec: ShardSpec, rank: int, draw: Callable[[Tensor], Tensor]) -> None:
    """Fills a shard with ``draw(positions)``, element by element as in the whole tensor.

    Args:
        out: the shard, 1-D or 2-D, of shape ``spec.local_shape(rank)``.
        draw: values for an int64 tensor of positions in the whole tensor (row-major), any shape.
    """
    if out.is_meta:
        return
    index = [torch.arange(length, device=out.device) for length in spec.shape]
    if spec.dim is not None:
        ranges = spec.global_ranges(rank)
        index[spec.dim] = torch.cat([torch.arange(a, b, device=out.device) for a, b in ranges])
    table = out.detach() if out.dim() == 2 else out.detach().unsqueeze(0)
    columns = index[-1]
    rows = index[0] if out.dim() == 2 else torch.zeros(1, dtype=torch.int64, device=out.device)
    step = max(1, _CHUNK // max(1, columns.numel()))
    for first in range(0, rows.numel(), step):
        positions = rows[first : first + step, None] * spec.shape[-1] + columns
        table[first : first + step] = draw(positions).to(out.dtype)


def _shift(x: Tensor, places: int) -> Tensor:
    """Logical right shift of int64 (torch shifts the sign in)."""
    return (x >> places) & (_MASK64 >> places)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value
