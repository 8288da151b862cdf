"""fp32 matmuls of a linear layer by MKL, as torch calls it, oneDNN and NumPy's OpenBLAS, in turns.

``python -m benchmarks.engine.matmul [FILE]`` prints rates and rounding errors, and writes all
samples to FILE. Times are of the thread's own processor time, which other work on the machine
disturbs least. Run it with ``OMP_NUM_THREADS=1``, which OpenBLAS reads when it is loaded.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.engine.report import write_report

SHAPES = (
    (2048, 1024, 2816),
    (2048, 1024, 16000),
    (512, 576, 1536),
    (512, 768, 576),
    (16, 576, 1536),
)
SECONDS = 3.0


def ways(rows: int, inputs: int, outputs: int) -> dict[str, Callable[[], Tensor]]:
    """Forward, input gradient and weight gradient, each by all three."""
    x, grad = torch.randn(rows, inputs), torch.randn(rows, outputs)
    weight = torch.randn(outputs, inputs)

    def onednn(a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")
        return result

    def openblas(a: Tensor, b: Tensor) -> Tensor:
        return torch.from_numpy(np.matmul(a.numpy(), b.numpy()))

    return {
        "forward, MKL": lambda: F.linear(x, weight),
        "forward, oneDNN": lambda: onednn(x, weight),
        "forward, OpenBLAS": lambda: openblas(x, weight.t()),
        "input gradient, MKL": lambda: grad @ weight,
        "input gradient, oneDNN": lambda: onednn(grad, weight.t()),
        "input gradient, OpenBLAS": lambda: openblas(grad, weight),
        "weight gradient, MKL": lambda: grad.t() @ x,
        "weight gradient, oneDNN": lambda: onednn(grad.t(), x.t()),
        "weight gradient, OpenBLAS": lambda: openblas(grad.t(), x),
    }


def errors(rows: int, inputs: int, outputs: int) -> list[float]:
    """Of MKL, oneDNN and OpenBLAS in the forward product: root mean square, relative to fp64's."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    exact = x.double() @ weight.double().t()
    found = (
        F.linear(x, weight),
        torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], ""),
        torch.from_numpy(np.matmul(x.numpy(), weight.numpy().T)),
    )
    return [((y - exact).norm() / exact.norm()).item() for y in found]


def measure(rows: int, inputs: int, outputs: int) -> dict[str, list[float]]:
    """Seconds of each call."""
    functions = ways(rows, inputs, outputs)
    for function in functions.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    started = time.monotonic()
    while time.monotonic() - started < SECONDS or len(samples["forward, MKL"]) < 5:
        for name, function in functions.items():
            began = time.thread_time()
            function()
            samples[name].append(time.thread_time() - began)
    return samples


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {
        f"{rows} x {inputs} x {outputs}": measure(rows, inputs, outputs)
        for rows, inputs, outputs in SHAPES
    }
    print(f"{'GFLOP/s, one thread':<24}" + "".join(f"{shape:>20}" for shape in found))
    medians = {
        shape: {name: statistics.median(of) for name, of in samples.items()}
        for shape, samples in found.items()
    }
    for name in ways(1, 1, 1):
        rates = [
            2e-9 * rows * inputs * outputs / by_name[name]
            for (rows, inputs, outputs), by_name in zip(SHAPES, medians.values(), strict=True)
        ]
        print(f"{name:<24}" + "".join(f"{rate:>20.1f}" for rate in rates))
    for rows, inputs, outputs in ((512, 576, 1536), (512, 1536, 576), (512, 24576, 576)):
        found_errors = "  ".join(f"{error:.1e}" for error in errors(rows, inputs, outputs))
        print(f"errors of {rows} x {inputs} x {outputs} (MKL, oneDNN, OpenBLAS): {found_errors}")
    if len(sys.argv) > 1:
        command = "OMP_NUM_THREADS=1 python -m benchmarks.engine.matmul"
        write_report(sys.argv[1], command, medians, found)


if __name__ == "__main__":
    main()
