"""Whether matmuls in chunks, each sent behind the next one, make a training step faster here.

``python -m benchmarks.engine.chunks [FILE]`` prints a table, and writes all samples to FILE. The
same steps (forward, backward) in turns with whole messages and with smaller and smaller chunks, on
Gloo and on the engine over MPI, with and without sequence parallelism.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import colrow
from benchmarks.engine.report import write_report
from colrow.launch import launch

CHUNK_BYTES = (None, 1 << 20, 1 << 18, 1 << 16)
TURNS, STEPS = 4, 6
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1408,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
BATCH, SEQUENCE = 2, 512  # messages of 2 MiB


def measure(engine: str, sequence_parallel: bool) -> dict[str, list[float]]:
    """Seconds of each step, by chunk size, on rank 0's clock."""
    mesh = colrow.init_mesh(tp=2, device="cpu", engine=engine)
    torch.set_num_threads(1)
    ids = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) % CONFIG["vocab_size"]
    models = {
        chunk_bytes: colrow.from_config(
            CONFIG, mesh, sequence_parallel=sequence_parallel, chunk_bytes=chunk_bytes
        ).train()
        for chunk_bytes in CHUNK_BYTES
    }
    found: dict[str, list[float]] = {}
    for turn in range(TURNS + 1):
        for chunk_bytes, model in models.items():
            dist.barrier()
            for _ in range(STEPS):
                started = time.perf_counter()
                model.loss(ids, ids).backward()  # type: ignore[no-untyped-call]
                model.zero_grad()
                if turn:  # the first turn warms up
                    name = "whole" if chunk_bytes is None else f"{chunk_bytes >> 10} KiB"
                    found.setdefault(name, []).append(time.perf_counter() - started)
    return found


def main() -> None:
    samples: dict[str, list[float]] = {}
    summary = {}
    for engine in ("gloo", "mpi"):
        for sequence_parallel in (False, True):
            arguments = (engine, sequence_parallel)
            found = launch(measure, arguments, ranks=2, threads_per_rank=1)[0]
            form = "reduce-scatter" if sequence_parallel else "all-reduce"
            for chunk, seconds in found.items():
                low, median, high = statistics.quantiles(seconds, n=4)
                name = f"{form} over {engine}, {chunk}"
                samples[name] = seconds
                summary[name] = {"median": median, "quartiles": [low, high]}
                ratio = statistics.median(found["whole"]) / median
                print(f"{name:40} {median * 1e3:8.1f} ms  {ratio:5.2f} times as fast as whole")
    if len(sys.argv) > 1:
        write_report(sys.argv[1], "python -m benchmarks.engine.chunks FILE", summary, samples)


if __name__ == "__main__":
    main()
