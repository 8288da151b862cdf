"""Measures this machine, plans a tp=2 step from the measurement, runs the step, compares.

``python benchmarks/planner/this_machine.py [machine.json]`` writes the machine file, which
``colrow plan --machine`` reads. Ranks are measured at the same time, as they run in a step.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import colrow
from colrow.bench.link_result import LinkSettings, measure, merged_machine
from colrow.launch import launch
from colrow.planner import Layout, load_machine, predict
from colrow.planner.catalog import shape_of_sizes

RANKS = 2
SHAPE = shape_of_sizes(
    "small llama", "llama", hidden=512, layers=4, heads=8, kv_heads=4, ffn=1408, vocab=4096
)
LAYOUT = Layout(tp=RANKS, microbatch=4, global_batch=4, sequence=256, precision="fp32")


def median_seconds(function: Callable[[], object], repeats: int = 7) -> float:
    """Of several calls, after one that warms up; all ranks start together."""
    function()
    times = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_machine() -> dict[str, object]:
    """A machine file, as ``colrow bench --link --tp 2 --machine FILE`` writes it."""
    mesh = colrow.init_mesh(tp=RANKS)
    settings = LinkSettings(None, "auto", 1, seconds_each=0.2, machine=True)
    return merged_machine([measure(mesh, settings, print)])


def run_step() -> float:
    """Seconds of a training step of ours: the median of several."""
    torch.set_num_threads(1)
    mesh = colrow.init_mesh(tp=RANKS)
    model = colrow.from_config(SHAPE.config, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    torch.manual_seed(0)
    ids = torch.randint(0, SHAPE.config.vocab_size, (LAYOUT.microbatch, LAYOUT.sequence))

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model.loss(ids, ids).backward()
        optimizer.step()

    return median_seconds(step)


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "machine.json")
    measured = launch(measure_machine, (), ranks=RANKS)[0]
    path.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    prediction = predict(SHAPE, LAYOUT, load_machine(path))
    seconds = launch(run_step, (), ranks=RANKS)[0]
    for name, part in vars(prediction.time).items():
        print(f"  {name:12} {part * 1e3:8.1f} ms")
    error = prediction.step_seconds / seconds - 1
    print(
        f"predicted {prediction.step_seconds * 1e3:.1f} ms, measured {seconds * 1e3:.1f} ms "
        f"({100 * error:+.0f}%)"
    )


if __name__ == "__main__":
    main()
