"""Where colrow's time goes in the race's workloads, line by line, on two ranks over MPI.

``python -m benchmarks.peers.account [FILE]`` prints a table for each workload and writes it to FILE
as JSON. Each workload is run three times over: plainly, for its time; with the ledger, for what the
collectives take; and under torch's profiler, for the operations by kind. What is left of the plain
time is Python, between the operations. (With a ledger an all-reduce takes a longer way through
Python, some microseconds each, which then counts as communication.) Everything is of rank 0, whose
share is the largest.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd.profiler import profile

import colrow
from benchmarks.engine.report import write_report
from benchmarks.peers.__main__ import MODEL
from benchmarks.peers.decoding import Colrow as Generator
from benchmarks.peers.training import Colrow as Trainer
from benchmarks.peers.weights import prepare
from benchmarks.peers.workloads import WORKLOADS, Decoding, Training
from colrow.bench.attribution import PREFIX, attribute
from colrow.comm.ledger import record
from colrow.launch import launch

CASES = ("train-256", "decode-fp32", "decode-bf16")
RUNS = {"step": 60, "first token": 6, "token": 6}
LINES = ("matmul", "attention", "optimiser", "other operations", "communication", "Python")
Account = dict[str, float]


def account(name: str, directory: Path) -> dict[str, tuple[Account, float]]:
    """On every rank: by what is timed, seconds by line, and how much the matmuls have to do.

    That is floating-point operations for a step and a first token, bytes of weights for a token.
    """
    torch.set_num_threads(1)
    colrow.init_mesh(tp=2, device="cpu", engine="mpi")
    workload = WORKLOADS[name]
    if isinstance(workload, Training):
        trainer = Trainer(workload, directory)
        tokens = workload.batch * workload.sequence
        work = 6.0 * tokens * _matmul_weights(trainer.model)
        return {"step": (_lines(trainer.step, trainer.model.tp, RUNS["step"]), work)}
    generator = Generator(workload, directory)
    weights = _matmul_weights(generator.model, tied=True)
    blocks = _matmul_weights(generator.model)
    itemsize = generator.dtype.itemsize

    def tokens_of(count: int) -> Callable[[], object]:
        generator.workload = Decoding(workload.name, workload.dtype, workload.prompt, count, 1)
        return generator.generate

    first = _lines(tokens_of(1), generator.model.tp, RUNS["first token"])
    both = _lines(tokens_of(workload.tokens), generator.model.tp, RUNS["token"])
    later = {line: (both[line] - first[line]) / (workload.tokens - 1) for line in both}
    return {
        "first token": (first, 2.0 * workload.prompt * blocks),
        "token": (later, float(itemsize * weights)),
    }


def _matmul_weights(model: torch.nn.Module, *, tied: bool = False) -> int:
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.dim() == 2}
    return sum(size for n, size in matrices.items() if tied or not n.startswith("embedding"))


def _lines(call: Callable[[], object], tp: colrow.ParallelGroup, runs: int) -> Account:
    for _ in range(3):
        call()
    plain = statistics.median(_timed(call) for _ in range(runs))
    communication = []
    for _ in range(runs):
        with record(tp) as ledger:
            _timed(call)
        communication.append(ledger.seconds(exposed=True))
    kinds: list[dict[str, float]] = []
    for _ in range(runs):
        with profile() as trace, torch.profiler.record_function(f"{PREFIX}all"):
            _timed(call)
        events = trace.function_events or ()
        known = attribute(events, cuda=False)["all"].seconds
        adamw = sum(e.cpu_time_total for e in events if e.name == "aten::_fused_adamw_") / 1e6
        own = sum(e.self_cpu_time_total for e in events if "::" in e.name) / 1e6
        others = own - adamw - sum(known.values())
        kinds.append({**known, "optimiser": adamw, "other operations": others})
    found = {line: statistics.median(kind[line] for kind in kinds) for line in kinds[0]}
    found["communication"] = statistics.median(communication)
    found["Python"] = plain - sum(found.values())
    return found


def _timed(call: Callable[[], object]) -> float:
    dist.barrier()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    summary: dict[str, object] = {}
    for name in CASES:
        directory = prepare(WORKLOADS[name], MODEL)
        for what, (lines, work) in launch(account, (name, directory), ranks=2, threads_per_rank=1)[
            0
        ].items():
            whole = sum(lines.values())
            unit = "GB/s" if what == "token" else "GFLOP/s"
            rate = work / lines["matmul"] / 1e9
            summary[f"{name}, {what}"] = {"seconds": lines, "sum": whole, f"matmul {unit}": rate}
            print(f"\n{name}, {what}: {whole * 1e3:.1f} ms; matmuls at {rate:.1f} {unit}")
            for line in LINES:
                print(f"  {line:18}{lines[line] * 1e3:8.2f} ms {lines[line] / whole:6.1%}")
    if len(sys.argv) > 1:
        write_report(sys.argv[1], "python -m benchmarks.peers.account FILE", summary, {})


if __name__ == "__main__":
    main()
