"""Pipelines whose stages sleep for a known time, on the ranks of the test pool."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from colrow.comm.group import ParallelGroup

CLASSES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return grads[0], None, None


class SleepingStage(nn.Module):
    """Sleeps in forward, in the gradient of the input, and in that of the weight.

    The first stage's input needs no gradient; its offset stands for the embedding, which does.
    """

    def __init__(self, forward: float, input: float, weight: float, *, first: bool) -> None:
        super().__init__()
        self.seconds = (forward, input, weight)
        self.weight = nn.Parameter(torch.ones(2))
        self.offset = nn.Parameter(torch.zeros(2)) if first else None

    def forward(self, x: Tensor) -> Tensor:
        forward, input, weight = self.seconds
        if self.offset is not None:
            x = x + self.offset
        x = _Sleep.apply(x, forward, input)  # type: ignore[no-untyped-call]
        scale: Tensor = _Sleep.apply(self.weight, 0.0, weight)  # type: ignore[no-untyped-call]
        return x * scale


def loss(output: Tensor, _: Tensor) -> Tensor:
    return output.sum()


def stage_indices(schedule: str, pp: ParallelGroup, chunks: int) -> list[int]:
    """Which stages this rank has."""
    if schedule == "zbv":
        return [pp.rank, 2 * pp.size - 1 - pp.rank]
    return list(range(pp.rank, pp.size * chunks, pp.size))


def sleeping_pipeline(
    pp: ParallelGroup, schedule: str, microbatches: int, chunks: int, parts: tuple[float, ...]
) -> tuple[Any, list[Any]]:
    """A schedule and this rank's stages, whose parts take so many seconds."""
    example = torch.ones(1, 2)
    stages = [
        PipelineStage(
            SleepingStage(*parts, first=index == 0),
            index,
            pp.size * chunks,
            torch.device("cpu"),
            input_args=(example.clone().requires_grad_(index > 0),),
            output_args=(example.clone().requires_grad_(),),
            group=pp.group,
        )
        for index in stage_indices(schedule, pp, chunks)
    ]
    single = schedule in ("gpipe", "1f1b")
    return (
        CLASSES[schedule](stages[0] if single else stages, microbatches, loss_fn=loss),
        stages,
    )


def run_step(schedule: Any, stages: list[Any], microbatches: int) -> None:
    """One step on a batch of ones."""
    batch = torch.ones(microbatches, 2)
    first = any(stage.is_first for stage in stages)
    last = any(stage.is_last for stage in stages)
    schedule.step(*([batch] if first else []), target=batch if last else None)
