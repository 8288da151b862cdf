"""Training through pipelines against one process of transformers and torch; what is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import colrow
from colrow.comm.ledger import record, summarize
from colrow.mesh import ParallelGroup
from colrow.pipeline.communication import predict_pipeline_step
from colrow.pipeline.runner import PipelineRunner
from tests.pipeline.layouts import SEQUENCE, Pipe, make_mesh, make_stepper
from tests.ranks import RankPool
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
Found = tuple[list[tuple[float, float]], dict[str, Tensor], list[object], list[object]]


def take_steps(world: ParallelGroup, pipe: Pipe, tokens: Path, steps: int = STEPS) -> Found:
    """Losses and norms, the whole weights afterwards, what was sent and what was predicted."""
    mesh = make_mesh(world, pipe)
    stepper = make_stepper(mesh, pipe, tokens)
    found = [stepper.step(index, RATE) for index in range(steps)]
    assert isinstance(stepper.loss, PipelineRunner)
    whole = colrow.full_state_dict(stepper.model)
    with record(*mesh.groups) as ledger:
        stepper.loss.backward(stepper._microbatches(0), 1.0)
    predicted = predict_pipeline_step(
        stepper.model.config,
        stepper.model.layout,
        stepper.model.pipeline.split,
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
    sent: list[object] = list(summarize(ledger.calls))
    return (
        [(result.loss, result.grad_norm) for result in found],
        whole,
        sent,
        list(summarize(predicted)),
    )


@pytest.mark.parametrize("pipe", PIPES, ids=str)
def test_steps_are_those_of_one_process_and_send_what_is_predicted(
    ranks: RankPool, tokens: Path, pipe: Pipe
) -> None:
    expected, expected_weights = reference(tokens, config=pipe.config)
    answers = ranks(pipe.ranks, take_steps, pipe, tokens)
    for found, _, sent, predicted in answers:
        for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-12)
            assert norm == pytest.approx(expected_norm, rel=1e-10)
        assert sent == predicted
    weights = answers[0][1]
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-8, atol=1e-11, msg=name)
