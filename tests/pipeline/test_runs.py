"""``colrow train`` that begins in a pipeline and ends without one, and its export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from colrow.cli import main
from tests.train.curves import write_inputs
from tests.train.test_faults import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def exported(run: Run, directory: Path) -> dict[str, torch.Tensor]:
    assert main(["export", str(run.output), str(directory)]) == 0
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_run_leaves_its_pipeline_and_is_exported_as_ever(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    common: dict[str, Any] = {"steps": 6, "save_every": 4, "precision": "fp64"}
    moves = Run(tmp_path, "moves", **common, tp=2, pp=2, schedule="gpipe")
    assert moves.end() == 0, moves.lines
    shutil.rmtree(moves.output / "checkpoints" / "step-00000006")
    again = Run(tmp_path, "moves", **common)
    again.until("continuing after step 4")
    assert again.end() == 0, again.lines
    stays = Run(tmp_path, "stays", **common)
    assert stays.end() == 0, stays.lines
    found, expected = exported(moves, tmp_path / "a"), exported(stays, tmp_path / "b")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-9, atol=1e-13, msg=name)
