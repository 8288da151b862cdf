"""The collectives of one training step, predicted and recorded side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import record, summarize
from colrow.models.config import ModelConfig
from colrow.models.decoder import Decoder


@dataclass(frozen=True)
class Traffic:
    """One step's collectives on one rank.

    Attributes:
        predicted, recorded: rows of ``op``, ``phase``, ``layer``, ``bytes`` (of one call),
            ``dtype``, ``group``, ``count``, sorted.
        seconds, exposed_seconds: of all recorded calls, from issue to completion and without what
            computing hid; None where nothing was really sent.
    """

    predicted: list[dict[str, object]]
    recorded: list[dict[str, object]]
    seconds: float | None
    exposed_seconds: float | None

    @property
    def equal(self) -> bool:
        """Whether the prediction holds call for call and byte for byte."""
        return self.predicted == self.recorded

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "predicted": self.predicted,
            "recorded": self.recorded,
            "equal": self.equal,
            "seconds": self.seconds,
            "exposed_seconds": self.exposed_seconds,
        }


def record_step(model: Decoder, *, batch: int, sequence: int) -> Traffic:
    """Runs ``model.loss(...).backward()`` on zeros as token ids and compares with the prediction.

    Works on meta tensors too. Every rank of the model's group must call it.
    """
    tp, parameter = model.tp, next(model.parameters())
    ids = torch.zeros(batch, sequence, dtype=torch.int64, device=parameter.device)
    with record(tp) as ledger:
        model.loss(ids, ids).backward()
    real = not parameter.is_meta
    return Traffic(
        summarize(model.predicted_calls(batch, sequence).calls),
        summarize(ledger.calls),
        ledger.seconds() if real else None,
        ledger.seconds(exposed=True) if real else None,
    )


def dry_run(
    config: ModelConfig,
    tp_size: int,
    *,
    batch: int,
    sequence: int,
    sequence_parallel: bool = False,
    tensor_split: str | Sequence[float] | None = None,
    keep_gathered_input: bool = True,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
) -> Traffic:
    """As :func:`record_step` for one rank of any model and any tp size, without memory or peers.

    The real layers run on meta tensors, over a process group that only pretends.
    """
    with _pretended_group(rank, tp_size) as tp:
        model = Decoder(
            config,
            tp,
            sequence_parallel=sequence_parallel,
            tensor_split=tensor_split,
            keep_gathered_input=keep_gathered_input,
            device="meta",
            dtype=dtype,
        )
        return record_step(model, batch=batch, sequence=sequence)


@contextmanager
def _pretended_group(rank: int, size: int) -> Iterator[ParallelGroup]:
    if size == 1:
        yield ParallelGroup.single()
        return
    if dist.is_initialized():
        raise ValueError("a dry run needs a process without a process group of its own")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield ParallelGroup(dist.group.WORLD, rank, size)
    finally:
        dist.destroy_process_group()
