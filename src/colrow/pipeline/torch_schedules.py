"""The schedules of ``torch.distributed.pipelining`` by colrow's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from colrow.pipeline.schedules import Schedule
from colrow.pipeline.stage import CountedStage

_CLASSES: dict[Schedule, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def build_schedule(
    name: Schedule,
    stages: list[CountedStage],
    microbatches: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """The schedule of these stages, for :func:`colrow.pipeline.limits.check_schedule`'s rules.

    Args:
        loss: of the last stage's output and the labels of a microbatch.
    """
    single = name in ("gpipe", "1f1b")
    options = {"n_microbatches": microbatches, "loss_fn": loss, "scale_grads": False}
    return _CLASSES[name](stages[0] if single else stages, **options)
