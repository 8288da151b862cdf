"""What the device can do: the fastest large matmul, and the fastest copy."""

from __future__ import annotations

import statistics

import torch

from benchmarks.gpu.timing import Timer

SIZES = (
    (4096, 4096, 4096),
    (8192, 4096, 4096),
    (8192, 8192, 4096),
    (8192, 8192, 8192),
    (16384, 8192, 8192),
    (8192, 12288, 6144),
)
SMALL_SIZES = ((64, 64, 64), (96, 64, 64))
_COPIED_BYTES = 4 << 30


def measure(timer: Timer, dtype: torch.dtype, small: bool) -> dict[str, object]:
    """TFLOP/s of each matmul ``[rows, inner] x [inner, columns]`` and GB/s of a copy.

    Random numbers, since zeros run faster than data. A copy reads each byte and writes it.
    """
    device = timer.device
    matmuls = []
    for rows, inner, columns in SMALL_SIZES if small else SIZES:
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        weight = torch.randn(columns, inner, device=device, dtype=dtype)
        times = timer.race({"matmul": {"matmul": lambda x=x, w=weight: x @ w.t()}})["matmul"]
        seconds = times.seconds["matmul"]
        flops = 2 * rows * inner * columns
        matmuls.append(
            {
                "shape": [rows, inner, columns],
                "teraflops": flops / statistics.median(seconds) / 1e12,
                "seconds": seconds,
            }
        )
    numbers = (1 << 20 if small else _COPIED_BYTES) // 4
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    copies = timer.race({"copy": {"copy": lambda: target.copy_(source)}})["copy"].seconds["copy"]
    return {
        "matmul_teraflops": max(float(found["teraflops"]) for found in matmuls),
        "memory_gigabytes_per_second": 2 * source.nbytes / statistics.median(copies) / 1e9,
        "matmuls": matmuls,
        "copy_seconds": copies,
    }
