"""Runs of ``colrow train`` in the pool's ranks, and the same by transformers and torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.checkpoint.training import TrainingCheckpoints
from colrow.comm.group import ParallelGroup
from colrow.optim.scaler import GradScaler
from colrow.train.batches import Order, Windows
from colrow.train.loop import make_loss
from colrow.train.optimizer import make_optimizers
from colrow.train.settings import TrainSettings
from colrow.train.starting_model import build_model
from colrow.train.step import Stepper
from colrow.train.tokens import TokenFile
from colrow.verification.reference import quiet_transformers
from tests.pipeline.layouts import Pipe
from tests.pipeline.layouts import make_mesh as make_pipeline_mesh
from tests.train.layouts import CLIP, RATE, Layout, make_mesh, torch_loop

STEPS = 6


def make_settings(model: Path | str, **options: Any) -> TrainSettings:
    """Of a run of the loop in :mod:`tests.train.layouts`."""
    values = {"precision": "fp64", "global_batch": 8, "clip": CLIP, "tokenizer": "bytes"}
    values |= {"sequence": 17, "data": "-", "output": "-", "model": str(model)}
    return TrainSettings(**{**values, **options})


def make_run(world: ParallelGroup, settings: TrainSettings, tokens: Path) -> Stepper:
    """The model, its optimisers and the order of the text."""
    mesh = make_mesh(world, Layout(settings.tp, settings.dp))
    if settings.pp > 1:
        mesh = make_pipeline_mesh(world, Pipe(pp=settings.pp))
    model = build_model(settings, mesh)
    assert (model.description.kind == "in place") == settings.in_place
    loss = make_loss(settings, model, mesh)
    return Stepper(
        model.module,
        loss,
        make_optimizers(model, settings),
        mesh,
        Order(Windows.of(TokenFile.open(tokens), 17), seed=1),
        microbatch=settings.microbatch,
        global_batch=settings.global_batch,
        clip=settings.clip,
        dropout_seed=settings.seed,
        scaler=GradScaler(mesh) if settings.precision == "fp16" else None,
    )


def curve(
    world: ParallelGroup,
    settings: TrainSettings,
    tokens: Path,
    first: int,
    last: int,
    checkpoints: Path | None = None,
) -> list[tuple[float, float]]:
    """Steps from ``first``, which continue from its checkpoint, to ``last``, which is saved."""
    run = make_run(world, settings, tokens)
    saved = None
    if checkpoints is not None:
        saved = TrainingCheckpoints(checkpoints, run.mesh, group=world.group)
        if first:
            saved.load(first, run.model, run.optimizers)
    results = [run.step(index, RATE) for index in range(first, last)]
    if saved is not None:
        saved.save(last, run.model, run.optimizers, {})
        saved.wait()
    return [(result.loss, result.grad_norm) for result in results]


@cache
def expected(directory: Path, tokens: Path) -> list[tuple[float, float]]:
    """The curve of one process of transformers and torch."""
    return torch_loop(load(directory), tokens, STEPS)


def load(directory: Path) -> Any:
    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float64, experts_implementation="eager"
        )
    return model.double().train()  # also what transformers keeps in fp32


def assert_same(found: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> None:
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted], rel=1e-11)
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in wanted], rel=1e-9)
