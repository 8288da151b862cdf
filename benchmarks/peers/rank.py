"""One process of a contestant: builds it, then does what the conductor writes to its stdin.

``python -m benchmarks.peers.rank WORKLOAD CONTESTANT DIRECTORY ENGINE``, with torchrun's variables.
Between two commands it blocks on reading, so that it takes no time from the others.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from benchmarks.peers.contestants import contestants
from benchmarks.peers.workloads import WORKLOADS


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
    os.dup2(2, 1)
    try:
        _serve(answers, *sys.argv[1:])
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        _answer(answers, {"error": f"{type(error).__name__}: {text[:400]}"})
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a process group whose peers are gone might not let go
    os._exit(0)


def _serve(answers: TextIO, workload_name: str, name: str, directory: str, engine: str) -> None:
    import torch

    import colrow

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    workload = WORKLOADS[workload_name]
    contestant = next(c for c in contestants(workload) if c.name == name)
    if contestant.split:
        world = int(os.environ["WORLD_SIZE"])
        colrow.init_mesh(tp=world, device="cpu", engine=engine, timeout=timedelta(minutes=5))
    running = contestant.load()(workload, Path(directory))  # type: ignore[call-arg]
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        command = line.strip()
        result = running.check() if command == "check" else running.measure()
        gc.collect()
        _answer(answers, result)


def _answer(answers: TextIO, result: object) -> None:
    answers.write(json.dumps(result) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
