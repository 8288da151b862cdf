"""One row times a weight, as decoding does it: by torch, oneDNN and NumPy's OpenBLAS, in turns.

``python -m benchmarks.engine.rows [FILE]`` prints GB/s of weights read by one thread, and writes
all samples to FILE. The weights of a shape do not fit into the caches together, so each is read
from memory. Times are of the thread's own processor time, which other work on the machine disturbs
least. Run it with ``OMP_NUM_THREADS=1``, which OpenBLAS reads when it is loaded.
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
from colrow.layers.decoding import BlasKernel, PackedKernel, has_fast_blas

# Of SmolLM2 on two ranks: q and k and v, gate and up, down, output on rank 0, and the head.
SHAPES = ((576, 576), (576, 1536), (768, 576), (320, 576), (576, 24576))
BYTES = 256_000_000
ROUNDS = 15

Product = Callable[[Tensor], object]


def ways(inputs: int, outputs: int) -> dict[str, tuple[list[Tensor], Product]]:
    """By name, the weights ``[out, in]`` in the order that it wants, and what it does with each."""
    count = max(2, BYTES // (4 * inputs * outputs))
    rows = [torch.randn(outputs, inputs) for _ in range(count)]
    columns = [weight.t().contiguous().t() for weight in rows]
    narrow = [weight.bfloat16() for weight in rows]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, 512) for weight in narrow]
    x, out = torch.randn(inputs), torch.empty(outputs)
    x16, out16 = x.bfloat16(), out.bfloat16()
    blas, torch_bf16 = BlasKernel(), PackedKernel(narrow[0])

    def onednn(weight: Tensor) -> object:
        return torch.ops.mkldnn._linear_pointwise(x16[None], weight, None, "none", [], "")

    return {
        "fp32, rows, torch": (rows, lambda w: F.linear(x, w)),
        "fp32, rows, OpenBLAS": (rows, lambda w: blas.row(x, w, out)),
        "fp32, columns, torch": (columns, lambda w: F.linear(x, w)),
        "fp32, columns, OpenBLAS": (columns, lambda w: blas.row(x, w, out)),
        "fp32, bare sum": (rows, lambda w: w.sum()),
        "bf16, rows, F.linear": (narrow, lambda w: F.linear(x16, w)),
        "bf16, packed, oneDNN": (packed, onednn),
        "bf16, rows, torch": (narrow, lambda w: torch_bf16.row(x16, w, out16)),
        "bf16, bare sum": (narrow, lambda w: w.sum()),
    }


def measure(inputs: int, outputs: int) -> dict[str, list[float]]:
    """Seconds for one weight, by way, of each round through all weights."""
    functions = ways(inputs, outputs)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, (weights, function) in functions.items():
            began = time.thread_time()
            for weight in weights:
                function(weight)
            samples[name].append((time.thread_time() - began) / len(weights))
    return samples


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not has_fast_blas():
        raise SystemExit("NumPy's BLAS is no OpenBLAS with one thread here: set OMP_NUM_THREADS=1")
    found = {f"{i} x {o}": measure(i, o) for i, o in SHAPES}
    medians = {
        shape: {name: statistics.median(of) for name, of in samples.items()}
        for shape, samples in found.items()
    }
    print(f"{'GB/s, one thread':<26}" + "".join(f"{shape:>14}" for shape in found))
    for name in next(iter(medians.values())):
        width = 2 if name.startswith("bf16") else 4
        rates = [
            width * inputs * outputs / by_name[name] / 1e9
            for (inputs, outputs), by_name in zip(SHAPES, medians.values(), strict=True)
        ]
        print(f"{name:<26}" + "".join(f"{rate:>14.1f}" for rate in rates))
    if len(sys.argv) > 1:
        command = "OMP_NUM_THREADS=1 python -m benchmarks.engine.rows"
        write_report(sys.argv[1], command, medians, found)


if __name__ == "__main__":
    main()
