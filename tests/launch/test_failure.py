"""Which rank's failure is the cause, out of what its launcher saw of all of them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from colrow.launch.failure import Evidence, root_cause
from colrow.launch.places import Place


def error(directory: Path, rank: int, message: str, *, lost: bool, time_ns: int = 0) -> None:
    record = {"time_ns": time_ns, "error_type": "RuntimeError", "message": message}
    record |= {"traceback": "", "bad_input": False, "timed_out": lost, "lost_peer": lost}
    (directory / f"rank-{rank}.json").write_text(json.dumps(record))


def test_what_the_launcher_did_is_not_the_cause(tmp_path: Path) -> None:
    error(tmp_path, 0, "all_reduce timed out", lost=True)
    # A watchdog such as NCCL's ends the process of a rank that waits.
    waiting, computing = Place("all_reduce", "x", 0, 1), Place("", "y.py, line 2, in f", 0, 1)
    evidence = Evidence(tmp_path, {0: 1, 1: 2, 2: 3})
    evidence.exit_codes = {0: 1, 1: -signal.SIGABRT, 2: None}
    evidence.places = {0: waiting, 1: waiting, 2: computing}
    assert root_cause(evidence).rank == 0  # nothing better is known
    evidence.hung = {2: "it is at y.py, line 2, in f"}
    assert root_cause(evidence).rank == 2
    evidence.exit_codes[2] = -signal.SIGBUS
    assert str(root_cause(evidence)).startswith("rank 2 was killed by SIGBUS")
    assert "/dev/shm" in str(root_cause(evidence))
    evidence.exit_codes[2] = -signal.SIGKILL
    assert str(root_cause(evidence)) == "rank 2 was killed by SIGKILL; the other ranks were stopped"
    evidence.oom_kills = -1
    assert "rank 2 was killed by SIGKILL: the kernel had no memory left" in str(
        root_cause(evidence)
    )
    error(tmp_path, 1, "no such layer", lost=False)
    assert root_cause(evidence).message == "no such layer"
