"""Training with Muon and Adafactor, saved in one layout and continued in another; the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colrow.checkpoint.training import TrainingCheckpoints
from colrow.cli import main
from colrow.comm.group import ParallelGroup
from colrow.train.optimizer import make_optimizers
from colrow.train.settings import TrainSettings
from colrow.train.step import Stepper
from tests.pipeline import layouts as pipes
from tests.ranks import RankPool
from tests.train.layouts import Layout, config_file, make_mesh, make_stepper

FIRST, SECOND, RATE = 2, 2, 1e-2
LAYOUTS: list[Layout | pipes.Pipe] = [
    Layout(tp=2),
    Layout(tp=3, sequence_parallel=True),
    Layout(),
    Layout(tp=2, dp=2, fsdp=True),
    pipes.Pipe(layers=2),
]


def stepper(world: ParallelGroup, layout: Layout | pipes.Pipe, tokens: Path, name: str) -> Stepper:
    if isinstance(layout, pipes.Pipe):
        made = pipes.make_stepper(pipes.make_mesh(world, layout), layout, tokens)
    else:
        mesh = make_mesh(world, layout)
        made = make_stepper(mesh, layout, tokens, microbatch=8 // layout.dp, clip=pipes.CLIP)
    settings: Any = TrainSettings(model="m", data="d", output="o", optimizer=name)
    made.optimizers = make_optimizers(made.model, settings)
    return made


def save_and_continue(
    world: ParallelGroup, layout: Layout | pipes.Pipe, tokens: Path, directory: Path, name: str
) -> dict[str, list[float]]:
    """Four steps without a break, saved half-way, and the last two from every checkpoint there."""
    run = stepper(world, layout, tokens, name)
    found = {"": [run.step(index, RATE).loss for index in range(FIRST)]}
    checkpoints = TrainingCheckpoints(directory / str(layout), run.mesh, group=world.group)
    checkpoints.save(FIRST, run.model, run.optimizers, {})
    checkpoints.wait()
    found[""] += [run.step(FIRST + index, RATE).loss for index in range(SECOND)]
    for other in sorted(directory.iterdir()):
        run.optimizers = make_optimizers(run.model, SimpleNamespace(**OPTIONS, optimizer=name))
        checkpoints = TrainingCheckpoints(other, run.mesh, group=world.group)
        checkpoints.load(FIRST, run.model, run.optimizers)
        found[other.name] = [run.step(FIRST + index, RATE).loss for index in range(SECOND)]
    return found


OPTIONS = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "momentum": 0.95, "epsilon": 1e-8}


@pytest.mark.parametrize("name", ["muon", "adafactor", "sgd"])
def test_state_is_divided_anew(ranks: RankPool, tokens: Path, tmp_path: Path, name: str) -> None:
    expected: list[float] = []
    for layout in LAYOUTS:
        found = ranks(layout.ranks, save_and_continue, layout, tokens, tmp_path, name)[0]
        expected = expected or found[""]
        for other, losses in found.items():
            assert losses == pytest.approx(expected[-len(losses) :], rel=1e-10), (layout, other)


@pytest.mark.parametrize("name", ["muon", "adafactor", "sgd"])
def test_the_command_trains_with_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 60)
    command = ["train", "--model", str(config_file(tmp_path)), "--tokenizer", "bytes", "--data",
               str(tmp_path / "text.txt"), "--output", str(tmp_path / "run"), "--optimizer", name,
               "--sequence", "16", "--eval-sequences", "4", "--warmup-steps", "1",
               "--device", "cpu"]  # fmt: skip
    assert main([*command, "--steps", "3"]) == 0
    assert main([*command, "--steps", "4", "--json", str(tmp_path / "end.json")]) == 0
    assert json.loads((tmp_path / "end.json").read_text())["step"] == 4
    assert main([*command, "--steps", "5", "--optimizer", "adamw"]) == 2
