"""Training through pipelines against one process of transformers and torch; what is sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import colrow
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import record, summarize
from colrow.pipeline.messages import predict_pipeline_step
from colrow.pipeline.runner import PipelineRunner
from colrow.train.batches import Order, Windows
from colrow.train.step import Stepper, counted, evaluate
from colrow.train.tokens import Encoded, TokenFile, write_tokens
from tests.pipeline.layouts import (
    GLOBAL_BATCH,
    SEQUENCE,
    Pipe,
    make_mesh,
    make_one,
    make_stepper,
)
from tests.ranks import RankError, RankPool, run_world
from tests.train.layouts import RATE, STEPS, reference

PIPES = [
    Pipe(schedule="gpipe"),
    Pipe(schedule="1f1b", split="3,1"),
    Pipe(schedule="interleaved"),
    Pipe(schedule="interleaved", stages_per_rank=3, layers=6),
    Pipe(schedule="zero-bubble"),
    Pipe(schedule="zbv", tied=False),
    Pipe(schedule="zbv"),
    Pipe(pp=3, split="1,2,1", tied=False),
    Pipe(pp=4),
    Pipe(tp=2, split="3,1", tensor_split="3,1", sequence_parallel=True),
    Pipe(tp=2, schedule="interleaved", tied=False),
    Pipe(tp=2, schedule="zero-bubble", tensor_split="1,3"),
    Pipe(tp=2, schedule="zbv", sequence_parallel=True),
    Pipe(dp=2, schedule="1f1b"),
    Pipe(dp=2, schedule="zbv"),
    Pipe(dp=2, fsdp=True, schedule="1f1b"),
    Pipe(dp=2, fsdp=True, schedule="interleaved", tied=False),
]
LONG = [
    Pipe(pp=3, split="1,2,1"),
    Pipe(pp=3, schedule="zero-bubble"),
    Pipe(schedule="zero-bubble", stages_per_rank=3, layers=6),
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
        model.division,
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


@pytest.fixture(scope="module")
def questions(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text with every other sequence and an end of the rest that do not count."""
    ids = TokenFile.open(tokens).ids.tolist()
    counted = [i // 16 % 2 == 1 and 0 < i % 16 <= 1 + i // 48 % 14 for i in range(len(ids))]
    path = tmp_path_factory.mktemp("questions") / "tokens"
    write_tokens(path, [Encoded(ids, counted)], vocab_size=257)
    return path


def losses_and_norms(stepper: Stepper) -> list[float]:
    """Of two steps, and the loss of an evaluation, which drops nothing."""
    steps = [stepper.step(index, RATE) for index in range(2)]
    windows = stepper.order.windows
    held = evaluate(stepper.loss, stepper.mesh, windows, microbatch=2, sequences=7)
    return [*(value for step in steps for value in (step.loss, step.grad_norm)), held]


def in_a_pipeline(world: ParallelGroup | None, pipe: Pipe, tokens: Path) -> list[float]:
    return losses_and_norms(make_stepper(make_mesh(world, pipe), pipe, tokens))


def test_dropout_evaluation_and_what_counts_do_not_depend_on_the_pipeline(
    ranks: RankPool, questions: Path
) -> None:
    same: dict[str, Any] = {"dropout": 0.2, "label_smoothing": 0.1, "z_loss": 0.01}
    alone = make_one(Pipe(**same), questions)
    batches = alone._microbatches(0)
    counts = [counted(labels) for _, labels, _ in batches]
    assert min(counts) == 0 and len(set(counts)) > 2
    expected = losses_and_norms(alone)
    for option in same:
        without = make_one(Pipe(**{**same, option: 0.0}), questions).step(0, RATE).loss
        assert expected[0] != pytest.approx(without, rel=1e-4), option
    for pipe in (
        Pipe(**same, recompute="full", schedule="interleaved"),
        Pipe(**same, recompute="selective", schedule="gpipe"),
        Pipe(**same, schedule="zbv", tp=2, tensor_split="2,1", sequence_parallel=True),
        Pipe(**same, dp=2),
    ):
        for found in ranks(pipe.ranks, in_a_pipeline, pipe, questions):
            assert found == pytest.approx(expected, rel=1e-11), pipe


def refused(world: ParallelGroup, pipe: Pipe, tokens: Path, what: str) -> None:
    stepper = make_stepper(make_mesh(world, pipe), pipe, tokens)
    assert isinstance(stepper.loss, PipelineRunner)
    batches = stepper._microbatches(0)
    if what == "gradients":
        stepper.loss.backward(batches, 1.0)
    stepper.loss.backward(batches if what == "gradients" else batches[:3], 1.0)


@pytest.mark.parametrize(
    ("what", "message"), [("gradients", "zero_grad"), ("batches", r"not \[\(2, 17\)")]
)
def test_gradients_that_would_count_twice_and_other_batches_are_refused(
    ranks: RankPool, tokens: Path, what: str, message: str
) -> None:
    with pytest.raises(RankError, match=message) as caught:
        ranks(2, refused, Pipe(), tokens, what)
    assert sorted(caught.value.errors) == [0, 1]


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
