"""Some rows times a quantised weight, by ggml, by torch's 4-bit kernel and as plain numbers.

``python -m benchmarks.quantised.kernels [FILE]`` prints how many times as fast as colrow's bf16
kernel each way is, for 1 to 256 rows, and writes all samples to FILE. The weights of a shape do not
fit into the caches together, so each is read from memory, and the ways take turns. Times are of the
thread's own processor time, which other work on the machine disturbs least. Run it with
``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.engine.report import write_report
from colrow.layers.decoding import PackedKernel
from colrow.layers.quantised import Blocks, QuantisedWeight

# Inputs and outputs of one of two ranks: SmolLM2's q, k and v, gate and up, half of its head;
# Gemma 3 270M's gate and up, down; of an 8B model.
SHAPES = (
    ("Q4_1", 576, 576),
    ("Q4_1", 576, 1536),
    ("Q8_0", 576, 12288),
    ("Q5_0", 640, 2048),
    ("Q4_K", 1024, 640),
    ("Q6_K", 1024, 640),
    ("Q4_K", 4096, 4096),
    ("Q4_0", 4096, 4096),
)
ROWS = (1, 4, 12, 16, 256)
BYTES = 64_000_000
MOST = 24
ROUNDS = 5
REFERENCE = "bf16"

Product = Callable[[int], object]


def weights(kind: str, inputs: int, outputs: int) -> list[QuantisedWeight]:
    """As many as do not fit into the caches together."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    count = max(2, min(MOST, BYTES // (inputs * outputs // block * size)))
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        # Bytes below 0x38, so that the fp16 scales among them are below 1/2.
        data = generator.integers(0, 0x38, (outputs, inputs // block * size), dtype=np.uint8)
        held = (Blocks(int(number), kind, data),)
        found.append(
            QuantisedWeight(held, (0, inputs), inputs, dtype=torch.float32, label="weight")
        )
    return found


def ways(kind: str, inputs: int, outputs: int, rows: int) -> dict[str, tuple[int, Product]]:
    """By name, how many weights there are and what is done with one of them."""
    held = weights(kind, inputs, outputs)
    count = len(held)
    wide = [torch.randn(outputs, inputs) for _ in range(count)]
    narrow = [weight.bfloat16() for weight in wide]
    packed = [PackedKernel(weight) for weight in narrow]
    x, out = torch.randn(rows, inputs), torch.empty(rows, outputs)
    x16 = x.bfloat16()
    found: dict[str, tuple[int, Product]] = {
        "bf16": (count, lambda i: packed[i](x16, narrow[i], None)),
        "fp32": (count, lambda i: F.linear(x, wide[i])),
        "ggml": (count, lambda i: held[i].few_rows(x, out)),
        "scratch": (count, lambda i: held[i]._by_scratch(x)),
    }
    if kind in ("Q4_0", "Q4_1") and outputs % 16 == 0:
        four = [_int4(outputs, inputs) for _ in range(count)]
        found["int4pack"] = (
            count,
            lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(x16, four[i][0], 32, four[i][1]),
        )
    return found


def _int4(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Random 4-bit numbers in torch's packing, and a scale and a zero for each 32 of them."""
    numbers = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    return packed, torch.rand(inputs // 32, outputs, 2, dtype=torch.bfloat16)


def measure(kind: str, inputs: int, outputs: int, rows: int) -> dict[str, list[float]]:
    """Seconds for one weight, by way, of each round through all weights."""
    functions = ways(kind, inputs, outputs, rows)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS if rows < 256 else 3):
        for name, (count, function) in functions.items():
            began = time.thread_time()
            for index in range(count):
                function(index)
            samples[name].append((time.thread_time() - began) / count)
    return samples


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    samples: dict[str, dict[str, list[float]]] = {}
    medians: dict[str, dict[str, float]] = {}
    for kind, inputs, outputs in SHAPES:
        for rows in ROWS:
            name = f"{kind} {inputs} x {outputs}, {rows} rows"
            samples[name] = measure(kind, inputs, outputs, rows)
            medians[name] = {way: statistics.median(of) for way, of in samples[name].items()}
            reference = medians[name][REFERENCE]
            speeds = {way: reference / median for way, median in medians[name].items()}
            text = "  ".join(f"{way} {speed:.2f}" for way, speed in speeds.items())
            print(f"{name:32} {1e6 * reference:9.1f} us  {text}", flush=True)
    if len(sys.argv) > 1:
        command = "OMP_NUM_THREADS=1 python -m benchmarks.quantised.kernels"
        write_report(sys.argv[1], command, medians, samples)


if __name__ == "__main__":
    main()
