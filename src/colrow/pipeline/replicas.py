"""Gradients summed over data-parallel replicas once all microbatches have gone back.

Schedules with several stages on a rank, or with weight gradients computed apart, do not go backward
in the one order that DistributedDataParallel's hooks know. So the replicas of a pipeline add up
their gradients behind the schedule, in buckets, which is the same sum in one go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colrow.comm.bucket import all_reduce_together
from colrow.comm.group import ParallelGroup
from colrow.models.decoder import Decoder
from colrow.pipeline.messages import BUCKET_BYTES, buckets


@torch.no_grad()
def sum_replicas_(model: Decoder, dp: ParallelGroup) -> None:
    """Adds up every gradient over ``dp``, whose ranks have equal parameters.

    Communicates: one all-reduce for each bucket of at most :data:`BUCKET_BYTES`, or of one larger
    gradient. Parameters without a gradient count as zeros, so that ranks agree.
    """
    if dp.size == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads: list[Tensor] = [p.grad for p in trained if p.grad is not None]
    sizes = [grad.numel() * grad.element_size() for grad in grads]
    for members in buckets(sizes, BUCKET_BYTES):
        sums = all_reduce_together([grads[i] for i in members], dp, layer="gradients")
        for i, total in zip(members, sums, strict=True):
            grads[i].copy_(total)
