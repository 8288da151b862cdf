"""Vocab-parallel cross entropy next to torch's: time and memory of forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.shapes import group
from benchmarks.gpu.timing import Phases, Timer
from colrow import ParallelGroup, Partition, vocab_parallel_cross_entropy

VOCABULARY = 128_256
RANKS = 8
TOKENS = (1024, 4096, 16384)
_DIGITS = 2e-2


def measure(
    tokens: int, timer: Timer, dtype: torch.dtype, *, vocabulary: int = VOCABULARY
) -> dict[str, object]:
    """colrow on one rank's shard and on the whole vocabulary, F.cross_entropy on both.

    Raises:
        RuntimeError: when the two differ on the whole vocabulary.
    """
    whole = Partition.even(vocabulary, 1)
    shard = Partition.even(vocabulary, RANKS)
    labels = torch.randint(shard.size(0), (tokens,), device=timer.device)

    def logits(width: int) -> Tensor:
        x = torch.randn(tokens, width, device=timer.device, dtype=dtype)
        return x.requires_grad_()

    def colrow(x: Tensor, tp: ParallelGroup, partition: Partition) -> Tensor:
        return vocab_parallel_cross_entropy(x, labels, tp, partition=partition)

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(x, labels)

    _compare(colrow, plain, labels, vocabulary, timer.device)
    found: dict[str, object] = {}
    # Separate races: the logits of both would not fit beside each other where memory is short.
    for width, name, tp, partition in (
        (shard.size(0), f"shard of {RANKS}", group(RANKS), shard),
        (vocabulary, "whole vocabulary", ParallelGroup.single(), whole),
    ):
        x = logits(width)
        times = timer.race(
            {
                "colrow": _step(lambda x, tp=tp, p=partition: colrow(x, tp, p), x),
                "plain": _step(plain, x),
            }
        )
        for contestant, one in times.items():
            found[f"{contestant}, {name}"] = {
                "problem": one.problem,
                "peak_bytes": one.peak_bytes,
                "logits_bytes": x.numel() * x.element_size(),
                **{phase: {"seconds": samples} for phase, samples in one.seconds.items()},
            }
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "dtype": str(dtype).removeprefix("torch."),
        "contestants": found,
    }


def _step(loss: Callable[[Tensor], Tensor], x: Tensor) -> Phases:
    losses: list[Tensor] = []

    def forward() -> None:
        losses[:] = [loss(x)]

    def backward() -> None:
        x.grad = None
        losses.pop().backward()

    return {"forward": forward, "backward": backward}


def _compare(
    colrow: Callable[[Tensor, ParallelGroup, Partition], Tensor],
    plain: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocabulary: int,
    device: torch.device,
) -> None:
    x = torch.randn(labels.numel(), vocabulary, device=device)
    mine = colrow(x, ParallelGroup.single(), Partition.even(vocabulary, 1))
    theirs = plain(x)
    if not abs(float(mine - theirs)) <= 1e-5 * float(theirs):
        raise RuntimeError(f"the losses differ: colrow {float(mine)}, torch {float(theirs)}")
