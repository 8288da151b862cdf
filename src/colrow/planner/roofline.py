"""How long one kernel takes: the larger of computing and of moving bytes (Williams et al. 2009)."""

from __future__ import annotations

import math
from itertools import pairwise

from colrow.planner.hardware import Device

# Up to so many rows the weights stream past all multiprocessors without tiles: one matrix
# instruction's height (NVIDIA PTX, mma.m16n8k16).
VECTOR_ROWS = 16
# A matmul's result is cut into tiles, one to a multiprocessor at a time. Shapes that cuBLAS and
# CUTLASS use most; the best one counts.
TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
# Multiply-adds per element loaded below which feeding the multiprocessor limits it: a 128 x 128
# tile is at the limit (CUTLASS documentation, "Efficient GEMM", threadblock tiles).
TILE_INTENSITY = 64.0
# Before its first multiply-add a tile waits for its first operands, after its last it hands over to
# the next: about two trips to memory under load. Unloaded, one takes 0.3 us on V100 (Jia et al.
# 2018, arXiv 1804.06826); loaded, half a microsecond each is assumed.
TILE_LATENCY_SECONDS = 1.0e-6
# Rows that do not begin at multiples of 16 bytes cannot be loaded into tensor cores at full width
# (NVIDIA, Matrix Multiplication Background, section 2.1: 8 elements of 16 bits). Batched products
# of such rows run at this share of the peak of the fp32 units: fitted to the 20 rows of BLOOM's
# trials with 150 numbers per head on A100.
ROW_BYTES = 16
UNALIGNED_SHARE = 0.48


def matmul_seconds(
    device: Device,
    m: float,
    n: float,
    k: float,
    *,
    precision: str,
    itemsize: float,
    count: float = 1,
    weight_itemsize: float | None = None,
    aligned: bool = True,
) -> float:
    """Time of ``count`` matmuls ``[m, k] x [k, n]`` in one kernel.

    Args:
        itemsize: bytes of an element of all three matrices.
        weight_itemsize: of the ``[k, n]`` matrix, where that differs (quantised weights).
        aligned: whether all rows begin at multiples of 16 bytes, as tensor cores want them.
    """
    if min(m, n, k, count) <= 0:
        return 0.0
    flops = 2.0 * m * n * k * count
    weight = itemsize if weight_itemsize is None else weight_itemsize
    moved = count * (itemsize * (m * k + m * n) + weight * k * n)
    rate = device.flops(precision) * device.sustained_fraction
    if precision == "fp8":
        rate *= device.fp8_share
    if not aligned and itemsize < 4 and device.processors:
        rate = min(rate, device.flops("fp32") * UNALIGNED_SHARE)
    if device.matmul_curve:
        scale = device.flops(precision) / device.flops("fp32")
        computing = flops / (scale * _interpolate(device.matmul_curve, flops))
    elif device.processors and min(m, n) <= VECTOR_ROWS:
        computing = flops / min(m, n) * VECTOR_ROWS / rate
    elif device.processors:
        computing = _tiled_seconds(device, m, n, k, count, itemsize, rate)
    else:
        computing = flops / rate
    return max(computing, stream_seconds(device, moved)) + device.kernel_seconds


def _tiled_seconds(
    device: Device, m: float, n: float, k: float, count: float, itemsize: float, rate: float
) -> float:
    """Waves of tiles, one tile per multiprocessor and wave, with the best tile shape.

    A tile multiplies at its multiprocessor's share of the sustained rate, slower where it is too
    small to be fed; before and after it waits for memory and writes its result through its share
    of the memory's bandwidth. Tiles that overhang the matrix and the last, incomplete wave cost as
    much as full ones.
    """
    processors = device.processors
    best = math.inf
    for tile_m, tile_n in TILES:
        tiles = count * math.ceil(m / tile_m) * math.ceil(n / tile_n)
        waves = math.ceil(tiles / processors)
        area = tile_m * tile_n
        fed = min(1.0, area / (tile_m + tile_n) / TILE_INTENSITY)
        multiplying = 2.0 * area * k / (rate / processors * fed)
        written = area * itemsize * min(tiles, processors)
        seconds = waves * (multiplying + TILE_LATENCY_SECONDS + stream_seconds(device, written))
        best = min(best, seconds)
    return best


def stream_seconds(device: Device, moved_bytes: float) -> float:
    """Time of reading and writing so many bytes of the device's memory."""
    return moved_bytes / (device.memory_bandwidth * device.stream_fraction)


def _interpolate(curve: tuple[tuple[float, float], ...], at: float) -> float:
    """Linear in the logarithm of the size; constant outside the measured range."""
    if at <= curve[0][0]:
        return curve[0][1]
    for (size_a, value_a), (size_b, value_b) in pairwise(curve):
        if at <= size_b:
            share = math.log(at / size_a) / math.log(size_b / size_a)
            return value_a + share * (value_b - value_a)
    return curve[-1][1]
