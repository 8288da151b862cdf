"""How long one kernel takes: the larger of computing and of moving bytes (Williams et al. 2009)."""

from __future__ import annotations

import math
from itertools import pairwise

from colrow.planner.hardware import Device

# A matmul's result is cut into tiles, one to a multiprocessor at a time. Shapes that cuBLAS and
# CUTLASS use most; the best one counts.
TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
# Multiply-adds per element loaded below which feeding the multiprocessor limits it: a 128 x 128
# tile is at the limit (CUTLASS documentation, "Efficient GEMM", threadblock tiles).
TILE_INTENSITY = 64.0
# Filling and draining a tile's pipeline and writing its result, as an equal number of steps of the
# inner dimension. Calibrated, see colrow.planner.accuracy.
TILE_OVERHEAD = 160.0
# A fused attention kernel's rate as a share of the large matmul's, causal, 128 per head: 2-4k
# tokens on A100 give about 180 and 150 of 257 TFLOP/s (Dao 2023, arXiv 2307.08691, figures 5-6).
FLASH_FORWARD = 0.70
FLASH_BACKWARD = 0.60


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
) -> float:
    """Time of ``count`` matmuls ``[m, k] x [k, n]`` in one kernel.

    Args:
        itemsize: bytes of an element of all three matrices.
        weight_itemsize: of the ``[k, n]`` matrix, where that differs (quantised weights).
    """
    if min(m, n, k, count) <= 0:
        return 0.0
    flops = 2.0 * m * n * k * count
    weight = itemsize if weight_itemsize is None else weight_itemsize
    moved = count * (itemsize * (m * k + m * n) + weight * k * n)
    rate = _matmul_rate(device, m, n, k, count, flops, precision)
    return max(flops / rate, stream_seconds(device, moved)) + device.kernel_seconds


def _matmul_rate(
    device: Device, m: float, n: float, k: float, count: float, flops: float, precision: str
) -> float:
    if device.matmul_curve:
        scale = device.flops(precision) / device.flops("fp32")
        return scale * _interpolate(device.matmul_curve, flops)
    sustained = device.flops(precision) * device.sustained_fraction
    if not device.processors:
        return sustained
    return sustained * tile_efficiency(m, n, count, device.processors) * k / (k + TILE_OVERHEAD)


def tile_efficiency(m: float, n: float, count: float, processors: int) -> float:
    """Share of the multiprocessors' time that computes results that are kept.

    Tiles overhang the matrix, the last wave of tiles leaves multiprocessors idle, and small tiles
    cannot be fed; the best tile shape is taken.
    """
    best = 0.0
    for tile_m, tile_n in TILES:
        tiles = count * math.ceil(m / tile_m) * math.ceil(n / tile_n)
        waves = math.ceil(tiles / processors)
        used = count * m * n / (waves * processors * tile_m * tile_n)
        fed = min(1.0, tile_m * tile_n / (tile_m + tile_n) / TILE_INTENSITY)
        best = max(best, used * fed)
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
