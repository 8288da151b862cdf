"""Ranks that hang: noticed in time, and told from those that wait for them."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import colrow
from colrow.launch import RankFailure, launch

LIMIT = 3.0


def hang(engine: str, how: str, tp: int, dp: int) -> None:
    limit = timedelta(seconds=LIMIT)
    mesh = colrow.init_mesh(tp=tp, dp=dp, device="cpu", engine=engine, timeout=limit)
    x = torch.ones(3)
    dist.all_reduce(x, group=mesh.tp.group)
    if dist.get_rank() == 1:
        Path(os.environ["HUNG_AT"]).write_text(str(time.monotonic()))
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "loop":
            while True:
                pass
        elif how == "read":
            os.read(os.pipe()[0], 1)
        else:  # keeps the interpreter's lock
            re.match("(a+)+$", "a" * 60 + "b")
    while True:
        dist.all_reduce(x, group=mesh.tp.group)
        dist.all_reduce(x, group=mesh.dp.group)


STATES = {
    "stop": "it is stopped by a signal such as SIGSTOP",
    "loop": "it is at test_places.py, line ",
    "read": "it is at test_places.py, line ",
    "lock": "its interpreter has not run for|it is at test_places.py",
}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("engine", "how", "tp", "dp"),
    [
        ("gloo", "stop", 2, 1),
        ("mpi", "loop", 2, 1),
        *(
            pytest.param(engine, how, 2, dp, marks=slow)
            for engine in ("gloo", "mpi")
            for how, dp in [("stop", 2), ("loop", 1), ("read", 1), ("lock", 1), ("stop", 1)]
        ),
    ],
)
def test_the_rank_that_hangs_is_named_in_time(
    engine: str, how: str, tp: int, dp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "mpi" and importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    monkeypatch.setenv("HUNG_AT", str(tmp_path / "hung"))
    with pytest.raises(RankFailure) as caught:
        launch(hang, (engine, how, tp, dp), ranks=tp * dp, timeout_seconds=90)
    seconds = time.monotonic() - float((tmp_path / "hung").read_text())
    assert LIMIT <= seconds < LIMIT + 5
    assert re.search(rf"rank 1 did not respond for [2-5] s: ({STATES[how]})", str(caught.value))
    assert "waited in all_reduce" in str(caught.value)
    assert (caught.value.rank, caught.value.signal_name) == (1, None)


def stop_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_ranks_that_are_all_stopped_do_not_wait_for_each_other() -> None:
    message = "rank 0 did not respond for [3-6] s: it is stopped by a signal such as SIGSTOP"
    with pytest.raises(RankFailure, match=message):
        launch(stop_self, (), ranks=2, hang_seconds=3, timeout_seconds=60)


def wait_long(limit: float) -> None:
    mesh = colrow.init_mesh(tp=2, device="cpu", engine="gloo")
    if mesh.tp.rank == 1:
        time.sleep(limit)
    dist.barrier()


def test_ranks_that_take_long_are_only_mentioned(capfd: pytest.CaptureFixture[str]) -> None:
    launch(wait_long, (5.0,), ranks=2, hang_seconds=4)
    found = capfd.readouterr().err.splitlines()
    assert len(found) == 1
    assert "... rank 1 is waited for since 2 s: it is at test_places.py, line" in found[0]
    assert found[0].endswith("in wait_long; rank 0 waits in barrier")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTERM])
def test_a_signal_to_one_rank_of_a_training_run(number: signal.Signals, tmp_path: Path) -> None:
    from tests.ranks import child_ranks
    from tests.train.curves import write_inputs
    from tests.train.test_faults import Run

    write_inputs(tmp_path)
    options: dict[str, Any] = {"tp": 2, "steps": 10**6, "save_every": 10**6}
    run = Run(tmp_path, timeout_seconds=8, **options)
    run.until("step 3/")
    os.kill(child_ranks(run.process.pid)[1], number)
    started = time.monotonic()
    code = run.end()
    assert time.monotonic() - started < 8 + 5
    if number == signal.SIGTERM:
        assert code == 128 + number
        assert "saved after step" in run.lines[-1]
    else:
        assert code == 1
        assert "rank 1 did not respond for" in run.lines[-1]
        assert STATES["stop"] in run.lines[-1]
