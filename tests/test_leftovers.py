"""Locks that end with their process, and what killed processes leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from colrow.any_model.loading import alone
from colrow.checkpoint.training import TrainingCheckpoints
from colrow.leftovers import lock, part_of, scratch_directory, unlock
from tests.forked import in_another_process

MAKE = """
import sys, tempfile, pathlib
from colrow.leftovers import lock, part_of, scratch_directory
here = pathlib.Path(sys.argv[1])
tempfile.tempdir = str(here)
part_of(here / "x.gguf").write_text("half")
part_of(here / "tokens").mkdir()
lock(here / "run", "go away")
print(scratch_directory("ranks").name, flush=True)
input()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock and writes under temporary names."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_process_left_is_removed_and_nothing_else(
    other: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("colrow-ranks-mine", "colrow-ranks", "x.gguf.part", "x.gguf.123.part", "tokens"):
        (tmp_path / name).mkdir()
    # Of another host or container, whose process ids mean nothing here.
    (tmp_path / "x.gguf.00000000-1-1.part").mkdir()
    elsewhere = {entry.name for entry in tmp_path.iterdir() if str(other.pid) not in entry.name}

    def names() -> set[str]:
        made = scratch_directory("ranks")
        made.rmdir()
        for name in ("x.gguf", "tokens"):
            assert str(os.getpid()) in part_of(tmp_path / name).name
        return {entry.name for entry in tmp_path.iterdir()}

    assert len(names()) == len(elsewhere) + 3  # it still runs
    with pytest.raises(ValueError, match=rf"in use by another run \(process {other.pid} on .*away"):
        lock(tmp_path / "run", "go away")
    other.kill()
    other.wait()
    assert names() == elsewhere
    lock(tmp_path / "run", "go away")
    lock(tmp_path / "run", "go away")  # this process's already
    unlock(tmp_path / "run")
    unlock(tmp_path / "run")


def save(directory: str) -> str:
    """What a process says that saves there too."""
    layer = torch.nn.RMSNorm(2)
    checkpoints = TrainingCheckpoints(directory, alone())
    try:
        checkpoints.save(2, layer, torch.optim.SGD(layer.parameters()), {})
        checkpoints.wait()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def test_two_loops_do_not_save_into_one_directory(tmp_path: Path) -> None:
    layer = torch.nn.RMSNorm(2)
    optimizer = torch.optim.SGD(layer.parameters())
    (tmp_path / "step-00000007.part").mkdir()
    (tmp_path / "step-notes.part").mkdir()
    checkpoints = TrainingCheckpoints(tmp_path, alone())
    checkpoints.save(1, layer, optimizer, {})
    checkpoints.wait()
    assert "is in use by another run" in in_another_process(save, str(tmp_path))
    # A save of the same step was killed between its two renames.
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.old.part")
    del checkpoints
    assert in_another_process(save, str(tmp_path)) == ""
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {".lock", "step-notes.part", "step-00000001", "step-00000002"}
