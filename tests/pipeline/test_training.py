"""Training through pipelines against one process of transformers and torch; what is sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import colrow
from colrow.comm.ledger import record, summarize
from colrow.mesh import ParallelGroup
from colrow.pipeline.communication import predict_pipeline_step
from colrow.pipeline.runner import PipelineRunner
from colrow.train.batches import Order, Windows
from colrow.train.step import evaluate
from colrow.train.tokens import TokenFile
from tests.pipeline.layouts import (
    GLOBAL_BATCH,
    SEQUENCE,
    Pipe,
    make_mesh,
    make_one,
    make_stepper,
)
from tests.ranks import RankPool, run_world
from tests.train.layouts import RATE, STEPS, reference

PIPES = [
    Pipe(schedule="gpipe"),
    Pipe(schedule="1f1b", split="3,1"),
    Pipe(schedule="interleaved"),
    Pipe(schedule="zero-bubble"),
    Pipe(schedule="zbv", tied=False),
    Pipe(schedule="zbv"),
    Pipe(pp=3, split="1,2,1", tied=False),
    Pipe(pp=4),
    Pipe(tp=2, sequence_parallel=True),
    Pipe(tp=2, schedule="interleaved", tied=False),
    Pipe(tp=2, schedule="zero-bubble"),
    Pipe(tp=2, schedule="zbv", sequence_parallel=True),
    Pipe(dp=2, schedule="1f1b"),
    Pipe(dp=2, schedule="zbv"),
    Pipe(dp=2, fsdp=True, schedule="1f1b"),
    Pipe(dp=2, fsdp=True, schedule="interleaved", tied=False),
]
LONG = [
    Pipe(pp=3, split="1,2,1"),
    Pipe(pp=3, schedule="zero-bubble"),
    Pipe(tp=2, dp=2, sequence_parallel=True),
    Pipe(tp=2, dp=2, sequence_parallel=True, fsdp=True),
    Pipe(tp=2, dp=2, schedule="interleaved", fsdp=True, tied=False),
    Pipe(tp=2, dp=2, schedule="zbv", sequence_parallel=True),
    Pipe(tp=2, dp=2, schedule="zero-bubble"),
]


@dataclass(frozen=True)
class Found:
    """What a rank did: losses and norms, whole gradients and weights, what it sent."""

    steps: list[tuple[float, float]]
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]
    sent: list[dict[str, object]]
    predicted: list[dict[str, object]]


def take_steps(world: ParallelGroup | None, pipe: Pipe, tokens: Path, steps: int = STEPS) -> Found:
    mesh = make_mesh(world, pipe)
    stepper = make_stepper(mesh, pipe, tokens)
    runner, model = stepper.loss, stepper.model
    assert isinstance(runner, PipelineRunner)
    runner.backward(stepper._microbatches(0), 1.0)
    grads = colrow.full_grads(model)
    stepper.optimizer.zero_grad()
    found = [stepper.step(index, RATE) for index in range(steps)]
    weights = colrow.full_state_dict(model)
    with record(*mesh.groups) as ledger:
        runner.backward(stepper._microbatches(0), 1.0)
    predicted = predict_pipeline_step(
        model.config,
        model.layout,
        model.pipeline.split,
        pipe.schedule,
        tp_rank=mesh.tp.rank,
        pp_rank=mesh.pp.rank,
        microbatches=pipe.microbatches,
        batch=pipe.microbatch,
        sequence=SEQUENCE,
        dp=pipe.dp,
        dp_rank=mesh.dp.rank,
        fsdp=pipe.fsdp,
        sequence_parallel=pipe.sequence_parallel,
        dtype="float64",
    )
    losses = [(result.loss, result.grad_norm) for result in found]
    return Found(losses, grads, weights, summarize(ledger.calls), summarize(predicted))


def compare(answers: list[Found], pipe: Pipe, tokens: Path, steps: int = STEPS) -> None:
    """Loss, norm, gradients and weights with one process; what was sent with what was predicted."""
    expected, expected_weights = reference(tokens, config=pipe.config, steps=steps)
    for found in answers:
        for (loss, norm), (expected_loss, expected_norm) in zip(found.steps, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-12)
            assert norm == pytest.approx(expected_norm, rel=1e-10)
        assert found.sent == found.predicted
    for name, grad in one_process_grads(pipe, tokens).items():
        difference = (answers[0].grads[name] - grad).norm() / grad.norm()
        assert difference < 1e-12, name
    weights = answers[0].weights
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-8, atol=1e-11, msg=name)


def one_process_grads(pipe: Pipe, tokens: Path) -> dict[str, Tensor]:
    """Of the loss summed over the first step's tokens."""
    model = colrow.from_config(pipe.config, dtype=torch.float64).train()
    order = Order(Windows.of(TokenFile.open(tokens), SEQUENCE), seed=1)
    model.loss(*order.batch(0, GLOBAL_BATCH), reduction="sum").backward()
    return colrow.full_grads(model)


@pytest.mark.parametrize("pipe", PIPES, ids=str)
def test_steps_are_those_of_one_process_and_send_what_is_predicted(
    ranks: RankPool, tokens: Path, pipe: Pipe
) -> None:
    compare(ranks(pipe.ranks, take_steps, pipe, tokens), pipe, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("pipe", LONG, ids=str)
def test_curves_of_twenty_steps(tokens: Path, pipe: Pipe) -> None:
    found = run_world(pipe.ranks, take_steps, None, pipe, tokens, 20, timeout=300)
    compare(found, pipe, tokens, 20)


def with_dropout(world: ParallelGroup | None, pipe: Pipe, tokens: Path) -> list[float]:
    """Losses of steps and of an evaluation, which drops nothing."""
    stepper = make_stepper(make_mesh(world, pipe), pipe, tokens)
    losses = [stepper.step(index, RATE).loss for index in range(2)]
    windows = stepper.order.windows
    held = evaluate(stepper.loss, stepper.mesh, windows, microbatch=2, sequences=7)
    return [*losses, held]


def test_dropout_and_evaluation_do_not_depend_on_the_pipeline(
    ranks: RankPool, tokens: Path
) -> None:
    alone = make_one(Pipe(dropout=0.2), tokens)
    windows = alone.order.windows
    expected = [alone.step(index, RATE).loss for index in range(2)]
    expected.append(evaluate(alone.loss, alone.mesh, windows, microbatch=2, sequences=7))
    without = make_one(Pipe(), tokens).step(0, RATE).loss
    assert expected[0] != pytest.approx(without, rel=1e-4)
    for pipe in (
        Pipe(dropout=0.2, recompute="full", schedule="interleaved"),
        Pipe(dropout=0.2, recompute="selective", schedule="gpipe"),
        Pipe(dropout=0.2, schedule="zbv", tp=2, sequence_parallel=True),
        Pipe(dropout=0.2, dp=2),
    ):
        for found in ranks(pipe.ranks, with_dropout, pipe, tokens):
            assert found == pytest.approx(expected, rel=1e-12), pipe


def on_mpi(pipe: Pipe, tokens: Path) -> tuple[Found, str]:
    mesh = colrow.init_mesh(pp=pipe.pp, device="cpu", engine="mpi")
    return take_steps(None, pipe, tokens), mesh.engine.name


@pytest.mark.slow
def test_on_the_mpi_engine(tokens: Path) -> None:
    pytest.importorskip("mpi4py")
    for pipe in (Pipe(), Pipe(schedule="zbv"), Pipe(pp=3, split="1,1,2")):
        answers = run_world(pipe.ranks, on_mpi, pipe, tokens)
        assert {engine for _, engine in answers} == {"mpi"}
        compare([found for found, _ in answers], pipe, tokens)
