"""fp32 matmuls of a linear layer by MKL, as torch calls it, and by oneDNN: one thread, in turns.

``python -m benchmarks.engine.matmul [FILE]`` prints a table, and writes all samples to FILE. Times
are of the thread's own processor time, which other work on the machine disturbs least.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

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
    """Forward, input gradient and weight gradient, each twice."""
    x, grad = torch.randn(rows, inputs), torch.randn(rows, outputs)
    weight = torch.randn(outputs, inputs)

    def onednn(a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")
        return result

    return {
        "forward, MKL": lambda: F.linear(x, weight),
        "forward, oneDNN": lambda: onednn(x, weight),
        "input gradient, MKL": lambda: grad @ weight,
        "input gradient, oneDNN": lambda: onednn(grad, weight.t()),
        "weight gradient, MKL": lambda: grad.t() @ x,
        "weight gradient, oneDNN": lambda: onednn(grad.t(), x.t()),
    }


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
    if len(sys.argv) > 1:
        command = "python -m benchmarks.engine.matmul"
        rounded = {
            shape: {name: [float(f"{s:.3e}") for s in of] for name, of in samples.items()}
            for shape, samples in found.items()
        }
        write_report(sys.argv[1], command, medians, rounded)


if __name__ == "__main__":
    main()
